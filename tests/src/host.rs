//! The host of a test with guests: a daemon on a store of its own, raw images that must not change, and the guests' disks.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::daemon::{Daemon, Ran, run, temp_dir};
use crate::machine::{GuestDisk, Machine};

/// Bytes of a mebibyte.
pub const MIB: usize = 1 << 20;
/// The size of a disk where nothing else is said.
pub const DISK_BYTES: usize = 128 * MIB;
/// A disk's size on the host moves by this much for reasons that are not the test's: maps, journals, whole file system
/// blocks.
pub const SLACK: u64 = 2 * MIB as u64;

/// What every script in a guest starts with: end at the first failure; `sums TAG FILE...` prints the files' checksums.
pub const PRELUDE: &str = r#"
set -euo pipefail
mkdir -p /mnt/d
sums() { local tag=$1; shift; sha256sum "$@" | sed "s/^/sum $tag /"; }
random() { head -c $(($1 * 7919 % 60000 + 1)) /dev/urandom; }
"#;

/// Eight jobs, on two queues, that write and verify files until a line comes. Some of them always wait for a flush that others'
/// requests overtake: what is under way is then not what was offered last.
pub const VERIFY_IN_ROUNDS: &str = r#"
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt/d
cat >/tmp/job <<'JOB'
[verify]
directory=/mnt/d
size=2m
numjobs=8
cpus_allowed=0-1
cpus_allowed_policy=split
ioengine=libaio
direct=1
iodepth=16
rw=randwrite
bssplit=4k/50:16k/30:64k/20
verify=crc32c
verify_fatal=1
fsync=8
group_reporting=1
JOB
round=0
while ! read -t 0; do
    round=$((round + 1))
    fio /tmp/job >/tmp/fio 2>&1 || { cat /tmp/fio; dmesg | tail -20; exit 1; }
    echo "round $round"
done
read -r _
umount /mnt/d
e2fsck -fn /dev/vda
if dmesg | grep -iE 'I/O error|blk_update_request|hung task|reset'; then exit 1; fi
echo "sound"
"#;

/// Checksums of files by name.
pub type Sums = BTreeMap<String, String>;

/// The host: a daemon on a store, and a folder for images and sockets beside it.
pub struct Host {
    /// The daemon; `None` while it is down.
    pub daemon: Option<Daemon>,
    /// The raw images and what they must go on to be.
    bases: BTreeMap<PathBuf, String>,
    /// Everything lies in here; goes last.
    pub dir: TempDir,
}

impl Host {
    /// A daemon on an empty store.
    pub fn new() -> Self {
        let dir = temp_dir();
        let mut host = Self {
            daemon: None,
            bases: BTreeMap::new(),
            dir,
        };
        host.serve();
        host
    }

    /// Starts the daemon.
    pub fn serve(&mut self) {
        assert!(self.daemon.is_none(), "one is running");
        self.daemon = Some(Daemon::on_store(&self.store()));
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// A path beside the store.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a line of words against the daemon; `@/` stands for the folder.
    #[track_caller]
    pub fn line(&self, line: &str) -> Ran {
        let here = format!("{}/", self.dir.path().display());
        let words = line
            .split_whitespace()
            .map(|word| word.replace("@/", &here));
        self.daemon.as_ref().unwrap().cli(words)
    }

    /// A raw image full of noise, watched from now on. Noise, so that no byte of it passes for a zero or for anything else.
    pub fn noise(&mut self, name: &str, bytes: usize) -> Vec<u8> {
        let content = noise(bytes);
        let path = self.path(name);
        fs::write(&path, &content).unwrap();
        self.watch(path);
        content
    }

    /// Holds on to what an image is now.
    pub fn watch(&mut self, path: PathBuf) {
        let sum = sum_of(&fs::read(&path).unwrap());
        self.bases.insert(path, sum);
    }

    /// Serves a volume.
    #[track_caller]
    pub fn attach(&self, volume: &str, queues: u16) -> GuestDisk {
        self.line(&format!(
            "volume attach {volume} --socket @/{volume}.sock --queues {queues}"
        ))
        .ok();
        GuestDisk {
            socket: self.path(&format!("{volume}.sock")),
            queues,
        }
    }

    /// Boots a guest.
    pub fn boot(&self, name: &str, disks: &[GuestDisk], script: &str) -> Machine {
        Machine::boot(self.dir.path(), name, disks, &format!("{PRELUDE}{script}"))
    }

    /// Boots a guest that goes on when the daemon is started again.
    pub fn boot_reconnecting(&self, name: &str, disks: &[GuestDisk], script: &str) -> Machine {
        self.boot_with(name, disks, &["--reconnect"], script)
    }

    /// Boots a guest with more arguments of `scripts/guest`.
    pub fn boot_with(
        &self,
        name: &str,
        disks: &[GuestDisk],
        more: &[&str],
        script: &str,
    ) -> Machine {
        let script = format!("{PRELUDE}{script}");
        Machine::boot_with(self.dir.path(), name, disks, more, &script)
    }

    /// Bytes that the active layer of a volume takes here: what the daemon says and what the file system says must agree.
    #[track_caller]
    pub fn allocated(&self, volume: &str) -> u64 {
        let shown = self.line(&format!("volume show {volume} --json")).json();
        let said = shown["allocated_bytes"].as_u64().unwrap();
        let layer = shown["active_layer"].as_str().unwrap();
        let data = self.store().join("layers").join(layer).join("data");
        let found = fs::metadata(data).unwrap().blocks() * 512;
        assert!(
            said.abs_diff(found) <= SLACK,
            "{volume}: the daemon says {said}, its file has {found}"
        );
        found
    }

    /// Stops the daemon as an operator does.
    #[track_caller]
    pub fn stop(&mut self) {
        let (status, _, log) = self.daemon.take().unwrap().stop();
        assert!(status.success(), "{status}; log of the daemon:\n{log}");
    }

    /// Lets another daemon take over, and returns its log.
    #[track_caller]
    pub fn succeed(&mut self) -> String {
        self.try_succeed().unwrap_or_else(|log| panic!("{log}"))
    }

    /// The same.
    ///
    /// # Errors
    /// The log of one that could not.
    #[track_caller]
    pub fn try_succeed(&mut self) -> Result<String, String> {
        self.try_succeed_with(&[])
    }

    /// The same with more arguments.
    ///
    /// # Errors
    /// As `try_succeed`.
    #[track_caller]
    pub fn try_succeed_with(&mut self, more: &[&str]) -> Result<String, String> {
        let store = self.store();
        let arguments = ["--takeover", "--store", store.to_str().unwrap()];
        let arguments = arguments.iter().chain(more);
        let next = Daemon::try_start(arguments, &store.join("control.sock"));
        let next = next.map_err(|ran| ran.stderr)?;
        let (status, log) = self.daemon.replace(next).unwrap().ended();
        assert!(status.success(), "{status}; log of the daemon:\n{log}");
        Ok(self.daemon.as_ref().unwrap().log())
    }

    /// Ends the daemon as a crash does.
    pub fn kill(&mut self) {
        self.daemon.take().unwrap().kill();
    }

    /// Verifies the store, which no daemon may serve.
    #[track_caller]
    pub fn check(&self) {
        let store = self.store();
        run(["check", "--store", store.to_str().unwrap()]).ok();
    }

    /// The end of each test: no base has changed, the daemon ends well, and the store is sound.
    #[track_caller]
    pub fn finish(mut self) {
        self.stop();
        self.check();
        for (path, sum) in &self.bases {
            let now = sum_of(&fs::read(path).unwrap());
            assert_eq!(*sum, now, "{} has changed", path.display());
        }
        assert!(!self.bases.is_empty(), "each test has a base to watch");
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.daemon.as_ref().map(Daemon::log);
            let log = log.as_deref().unwrap_or("(it is not running)");
            eprintln!("log of the daemon:\n{log}");
        }
    }
}

/// Bytes that look like noise and are the same each time.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(bytes / 8).flatten().collect()
}

/// A checksum in the words of `sha256sum`.
pub fn sum_of(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The checksums that a guest printed with this tag.
pub fn sums(lines: &[String], tag: &str) -> Sums {
    let start = format!("sum {tag} ");
    let of_tag = lines.iter().filter_map(|line| line.strip_prefix(&start));
    of_tag
        .map(|line| {
            let (sum, name) = line.split_once("  ").unwrap();
            (name.to_owned(), sum.to_owned())
        })
        .collect()
}

/// Checks that all these files are among those.
#[track_caller]
pub fn assert_holds(found: &Sums, expected: &Sums) {
    for (name, sum) in expected {
        assert_eq!(found.get(name), Some(sum), "file {name}");
    }
}
