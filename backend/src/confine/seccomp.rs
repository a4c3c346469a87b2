//! The system calls of each kind of thread.
//!
//! Three answers to a call, by filters that a thread has on top of each other; the strictest counts:
//! - **The process ends** for calls that no fault of ours makes and every attack wants ([`hostile`]): another program, other
//!   processes, the kernel's own set-up, networks. Its successor takes over what was acknowledged, as after any crash, and
//!   what was taken over is gone.
//! - **ENOSYS**, a line in the log and a count ([`super::refused`]) for what is not on the list of the thread.
//! - It is made.
//!
//! A thread that starts others hands its filters down, so each list holds those of the threads that it starts:
//! files < worker < attachment < control, and files < work < control. The calls on the path of a request have no conditions,
//! so that the kernel answers them from a bitmap, whatever the number of filters.
//!
//! io_uring makes calls that no filter sees. A ring is made only by threads that may open files anyway, and is
//! restricted, before anything can be submitted to it, to transfers and syncs (`layers/src/file/uring`).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{Role, refused};

/// What every thread of a Rust program on glibc or musl makes: memory, waiting, clocks, signals, its end.
const RUNTIME: &[libc::c_long] = &[
    // These two are answered by `quiet`, if at all: a trap would end the process, since no signal comes through meanwhile.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];
/// Those of them that only this machine has.
#[cfg(target_arch = "x86_64")]
const RUNTIME_HERE: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_time];
/// Those of them that only this machine has.
#[cfg(not(target_arch = "x86_64"))]
const RUNTIME_HERE: &[libc::c_long] = &[];

/// What the threads that open no files do without, in silence: glibc's allocator looks into `/proc/sys/vm`, and the Rust
/// runtime, when it prints where a panic came from, into the program.
#[cfg(target_arch = "x86_64")]
const WITHOUT: &[libc::c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
];
/// What the threads that open no files do without, in silence: see there.
#[cfg(not(target_arch = "x86_64"))]
const WITHOUT: &[libc::c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_openat,
    libc::SYS_readlinkat,
];

/// Work on files that are open.
const FILES: &[libc::c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
];

/// Serving rings: waiting for kicks, requests to a ring of the kernel's that is there already, messages back.
const WORKER: &[libc::c_long] = &[
    libc::SYS_dup3,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_io_uring_enter,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
];
/// Those of them that only this machine has.
#[cfg(target_arch = "x86_64")]
const WORKER_HERE: &[libc::c_long] = &[libc::SYS_epoll_wait];
/// Those of them that only this machine has.
#[cfg(not(target_arch = "x86_64"))]
const WORKER_HERE: &[libc::c_long] = &[];

/// The names of files, for who opens, makes and removes them: the store and its catalog.
const NAMES: &[libc::c_long] = &[
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_flock,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getuid,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_statfs,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];
/// Those of them that only this machine has.
#[cfg(target_arch = "x86_64")]
const NAMES_HERE: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_stat,
    libc::SYS_unlink,
];
/// Those of them that only this machine has.
#[cfg(not(target_arch = "x86_64"))]
const NAMES_HERE: &[libc::c_long] = &[];

/// A connection to a front-end, and the start of its workers, who confine themselves in turn.
const ATTACHMENT: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_epoll_create1,
    libc::SYS_getsockopt,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_memfd_create,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_seccomp,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// The control socket, new sockets for front-ends, and the end of the daemon.
const CONTROL: &[libc::c_long] = &[
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_landlock_add_rule,
    libc::SYS_listen,
    libc::SYS_pipe2,
    libc::SYS_prlimit64,
    libc::SYS_sched_setaffinity,
    libc::SYS_socketpair,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];
/// Those of them that only this machine has.
#[cfg(target_arch = "x86_64")]
const CONTROL_HERE: &[libc::c_long] = &[libc::SYS_chown, libc::SYS_lchown];
/// Those of them that only this machine has.
#[cfg(not(target_arch = "x86_64"))]
const CONTROL_HERE: &[libc::c_long] = &[];

/// Calls that end the process, whoever makes them.
const HOSTILE: &[libc::c_long] = &[
    // Other programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    // Other users and name spaces.
    libc::SYS_chroot,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_tree,
    libc::SYS_pivot_root,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setns,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_setuid,
    libc::SYS_umount2,
    libc::SYS_unshare,
    // Files past their names.
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    // The kernel.
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];
/// Those of them that only this machine has.
#[cfg(target_arch = "x86_64")]
const HOSTILE_HERE: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kexec_file_load,
    libc::SYS_mknod,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS_vfork,
];
/// Those of them that only this machine has.
#[cfg(not(target_arch = "x86_64"))]
const HOSTILE_HERE: &[libc::c_long] = &[];

/// The calls of a filter, each with the conditions of which one must hold; none: always.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Filters that cannot be made are a fault of this file.
fn broken(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

/// A rule: this argument is, compared so, to this value. Of the lower half of the argument, which is what the kernel reads
/// where it asks for an int.
fn when(argument: u8, compare: SeccompCmpOp, value: u64) -> io::Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value);
    SeccompRule::new(vec![condition.map_err(broken)?]).map_err(broken)
}

/// A number from a C header as the kernel sees it in the lower half of a register.
fn word(number: i32) -> u64 {
    u64::from(number.cast_unsigned())
}

/// Installs a filter for this thread and those that it starts.
fn install(rules: Rules, matched: SeccompAction, others: SeccompAction) -> io::Result<()> {
    let machine = TargetArch::try_from(std::env::consts::ARCH).map_err(broken)?;
    let filter = SeccompFilter::new(rules, others, matched, machine).map_err(broken)?;
    let program = BpfProgram::try_from(filter).map_err(broken)?;
    seccompiler::apply_filter(&program).map_err(broken)
}

/// Calls without conditions.
fn always(lists: &[&[libc::c_long]]) -> Rules {
    let calls = lists.iter().copied().flatten();
    calls.map(|call| (*call, Vec::new())).collect()
}

/// Forbids what no thread makes. To be called while there is only one.
pub(super) fn for_all() -> io::Result<()> {
    if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        let what = "there are no lists of system calls for this machine";
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    refused::install()?;
    install(hostile()?, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// What ends the process.
fn hostile() -> io::Result<Rules> {
    let mut rules = always(&[HOSTILE, HOSTILE_HERE]);
    // Only sockets of this host, and only threads of this process.
    let foreign = when(0, SeccompCmpOp::Ne, word(libc::AF_UNIX))?;
    rules.insert(libc::SYS_socket, vec![foreign]);
    let process = when(0, SeccompCmpOp::MaskedEq(word(libc::CLONE_THREAD)), 0)?;
    rules.insert(libc::SYS_clone, vec![process]);
    Ok(rules)
}

/// What fails without a line in the log, and the error it fails with.
///
/// `clone3` hides its flags from filters; the C library takes `clone` where there is no such call, and [`hostile`] judges it.
fn quiet(role: Role<'_>) -> (&'static [libc::c_long], i32) {
    match role {
        Role::Control | Role::Attachment { .. } => (&[libc::SYS_clone3], libc::ENOSYS),
        Role::Work => (&[libc::SYS_clone3, libc::SYS_clone], libc::EACCES),
        Role::Worker | Role::Files => (WITHOUT, libc::EACCES),
    }
}

/// What a thread may do.
fn allowed(role: Role<'_>) -> io::Result<Rules> {
    let mut rules = always(&[RUNTIME, RUNTIME_HERE, FILES, WITHOUT]);
    // No new code.
    let data = || when(2, SeccompCmpOp::MaskedEq(word(libc::PROT_EXEC)), 0);
    rules.insert(libc::SYS_mmap, vec![data()?]);
    rules.insert(libc::SYS_mprotect, vec![data()?]);
    // A thread may end its process, and no other one.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![when(0, SeccompCmpOp::Eq, own)?]);
    let mut prctl = vec![
        when(0, SeccompCmpOp::Eq, word(libc::PR_SET_NAME))?,
        when(0, SeccompCmpOp::Eq, word(libc::PR_SET_VMA))?,
    ];
    let mut ioctl = vec![when(1, SeccompCmpOp::Eq, libc::FIONREAD)?];
    let lists: &[&[libc::c_long]] = match role {
        Role::Files => &[],
        Role::Worker => &[WORKER, WORKER_HERE],
        Role::Work => &[NAMES, NAMES_HERE],
        Role::Attachment { .. } => &[WORKER, WORKER_HERE, NAMES, NAMES_HERE, ATTACHMENT],
        Role::Control => &[
            WORKER,
            WORKER_HERE,
            NAMES,
            NAMES_HERE,
            ATTACHMENT,
            CONTROL,
            CONTROL_HERE,
        ],
    };
    rules.extend(always(lists));
    if matches!(role, Role::Work | Role::Attachment { .. } | Role::Control) {
        // Sharing blocks of files.
        ioctl.push(when(1, SeccompCmpOp::Eq, FICLONERANGE)?);
    }
    if matches!(role, Role::Attachment { .. } | Role::Control) {
        ioctl.push(when(1, SeccompCmpOp::Eq, libc::FIONBIO)?);
        // For the threads that it starts.
        prctl.push(when(0, SeccompCmpOp::Eq, word(libc::PR_SET_NO_NEW_PRIVS))?);
        prctl.push(when(0, SeccompCmpOp::Eq, word(libc::PR_CAPBSET_READ))?);
    }
    if role == Role::Control {
        let ours = when(0, SeccompCmpOp::Eq, word(libc::AF_UNIX))?;
        rules.insert(libc::SYS_socket, vec![ours]);
    }
    rules.insert(libc::SYS_prctl, prctl);
    rules.insert(libc::SYS_ioctl, ioctl);
    Ok(rules)
}

/// `ioctl` that shares a range of blocks between two files; the same on the machines that there are lists for.
const FICLONERANGE: u64 = 0x4020_940d;

/// Forbids what a thread of this kind does not make.
pub(super) fn narrow(role: Role<'_>) -> io::Result<()> {
    let (calls, error) = quiet(role);
    let error = SeccompAction::Errno(error.cast_unsigned());
    install(always(&[calls]), error, SeccompAction::Allow)?;
    install(allowed(role)?, SeccompAction::Allow, SeccompAction::Trap)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// An attachment.
    const ATTACHED: Role<'_> = Role::Attachment { socket: None };

    #[test]
    fn who_starts_threads_may_do_what_they_do() {
        let pairs = [
            (Role::Files, Role::Worker),
            (Role::Worker, ATTACHED),
            (ATTACHED, Role::Control),
            (Role::Work, Role::Control),
            (Role::Files, Role::Work),
        ];
        for (child, parent) in pairs {
            let (child_rules, parent_rules) = (allowed(child).unwrap(), allowed(parent).unwrap());
            for (call, conditions) in child_rules {
                let theirs = parent_rules.get(&call);
                let theirs = theirs.unwrap_or_else(|| panic!("{call} of {child:?} in {parent:?}"));
                let covered = theirs.is_empty()
                    || !conditions.is_empty() && conditions.iter().all(|one| theirs.contains(one));
                assert!(covered, "conditions of {call}: {child:?} in {parent:?}");
            }
        }
    }

    #[test]
    fn nothing_hostile_is_on_a_list() {
        let hostile = hostile().unwrap();
        for role in [
            Role::Files,
            Role::Worker,
            Role::Work,
            ATTACHED,
            Role::Control,
        ] {
            for call in allowed(role).unwrap().keys() {
                let conditional = [libc::SYS_socket, libc::SYS_clone].contains(call);
                assert!(
                    conditional || !hostile.contains_key(call),
                    "{call} of {role:?}"
                );
            }
        }
    }
}
