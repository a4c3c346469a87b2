//! Every form that scripts rely on, and what must not be understood.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use clap::CommandFactory;

use super::*;

/// Parses a line as a shell would split it.
fn parse(line: &str) -> Result<Cli, clap::Error> {
    let args = std::iter::once("stratablk").chain(line.split_whitespace());
    Cli::try_parse_from(with_serve_implied(args.map(OsString::from)))
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_form_that_scripts_rely_on_is_understood() {
    for line in [
        "serve --store /s",
        "serve --store /s --control /c",
        "--control /c serve --store /s",
        "serve --blk-file f --socket-path s",
        "serve --blk-file f --fd 3 --queues 2 --read-only",
        "serve --blk-file f --socket-path s --queues 4",
        "--blk-file=f --socket-path=s",
        "--fd=3 --blk-file=f --read-only",
        "volume create web --size 10G",
        "volume create web --base f",
        "volume create web --from db@s1",
        "volume list",
        "volume show web",
        "volume delete web",
        "volume attach web --socket /s",
        "volume attach web --socket /s --queues 2 --read-only",
        "volume detach web",
        "volume create web --from db --type immutable",
        "volume create web --size 1G --type writethrough",
        "volume set web --type multiattach",
        "volume set web --type readonly",
        "volume resize web 20G",
        "volume resize web +512",
        "volume resize web 1G --shrink --force",
        "volume recover web",
        "volume flatten web",
        "volume flatten web --wait --rate 10M",
        "volume attach web --socket /s --as web-a",
        "volume detach web --keep-as web-b",
        "snapshot restore web s1",
        "snapshot restore web s1 --keep s2 --only",
        "snapshot delete web s1",
        "snapshot delete web s1 --dry-run --push-down",
        "snapshot delete web s1 --wait --into-base --way up --rate 50M/s",
        "snapshot delete web s1 --way down",
        "scrub web",
        "scrub --all --wait --rate 10M",
        "check --store /s --scrub",
        "serve --store /s --checksum-rate none",
        "job list",
        "job show 1",
        "job wait 1",
        "job pause 1",
        "job resume 1",
        "job cancel 1",
        "job limit 1 50M",
        "job set-rate 1 none",
        "import disk.img web",
        "import disk.img web --wait --rate 1G",
        "clone web web2",
        "tree web --all",
        "diff web@s1",
        "diff web@s1 web@s2",
        "diff web@s1 web",
        "du",
        "du web db",
        "snapshot create s1 web",
        "snapshot create s1 web db",
        "snapshot create s1 --all",
        "snapshot list",
        "snapshot list web",
        "tree",
        "tree web",
        "check --store /s",
        "check --store /s --rebuild-catalog",
        "check --store /s --cache-dir /d",
        "serve --store /s --cache-size 64K --dirty-limit 4K --dirty-age 0",
        "serve --store /s --cache-size 1G --dirty-limit 1G --dirty-age 86400",
        "serve --blk-file f --socket-path s --cache-dir /d --cache-keep",
        "stats",
        "stats --json",
        "stats --watch 0.5",
        "clone web@s1 web2",
        "--print-capabilities",
        "--control /c volume list",
        "volume --control /c list",
        "volume list --control /c",
        "--json volume list",
        "volume list --json",
    ] {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    for line in [
        "serve",
        "serve --store /s --blk-file f --socket-path s",
        "serve --blk-file f",
        "serve --blk-file f --socket-path s --fd 3",
        "serve --store /s --socket-path s",
        "serve --store /s --read-only",
        "serve --store /s --queues 2",
        "serve --blk-file f --socket-path s --queues 0",
        "serve --blk-file f --socket-path s --queues 65",
        "volume",
        "volume create web",
        "volume create web --size 10G --base f",
        "volume create web --size ten",
        "volume create web --from @s1",
        "volume attach web",
        "snapshot create",
        "snapshot create s1",
        "snapshot create s1 web --all",
        "check",
        "serve --store /s --cache-size 65535",
        "serve --store /s --cache-size lots",
        "serve --store /s --dirty-limit 0",
        "serve --store /s --dirty-limit 4095",
        "serve --store /s --dirty-age -1",
        "serve --store /s --dirty-age 86401",
        "serve --store /s --dirty-age NaN",
        "serve --store /s --dirty-age inf",
        "volume create web --size 1G --type Normal",
        "volume set web",
        "volume resize web",
        "volume resize web -1G",
        "volume resize web 1G --force",
        "snapshot restore web",
        "snapshot delete web",
        "snapshot delete web s1 --way sideways",
        "snapshot delete web s1 --rate 0",
        "snapshot delete web s1 --dry-run --wait",
        "job",
        "job wait",
        "job wait first",
        "job limit 1",
        "job limit 1 fast",
        "import disk.img",
        "clone web@ web2",
        "diff",
        "stats web",
        "stats --watch 0",
        "stats --watch often",
        "frobnicate",
    ] {
        let error = parse(line)
            .err()
            .unwrap_or_else(|| panic!("{line} was understood"));
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn the_control_socket_is_found_before_and_after_the_command() {
    for line in [
        "--control /c volume list",
        "volume --control /c list",
        "volume list --control /c",
    ] {
        assert_eq!(
            parse(line).unwrap().control,
            Some(PathBuf::from("/c")),
            "{line}"
        );
    }
    for line in ["--json tree", "tree --json"] {
        assert!(parse(line).unwrap().json, "{line}");
    }
}

#[test]
fn a_size_is_in_binary_units() {
    let cli = parse("volume create web --size 10G").unwrap();
    let Some(Command::Volume(VolumeCommand::Create { name, source, .. })) = cli.command else {
        panic!("{cli:?}");
    };
    assert_eq!((name.as_str(), source.size), ("web", Some(10 << 30)));
}
