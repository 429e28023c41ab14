//! What goes along with the program: completions, pages of the manual, and the archive of it all.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use wg_userspace::sys::netns::report_skipped;
use xtask::dist::{self, Contents};

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

fn tidegate(arguments: &[&str]) -> Output {
    let output = Command::new(TIDEGATE).args(arguments).env_clear().output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output
}

/// The commands that `--help` lists below a command.
fn commands(above: &[&str]) -> Vec<String> {
    let help = String::from_utf8(tidegate(&[above, &["--help"]].concat()).stdout).unwrap();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let rows = listed.take_while(|line| !line.is_empty());
    let names = rows.filter(|row| row.starts_with("  ") && !row.starts_with("   "));
    let names = names.map(|row| row.split_whitespace().next().unwrap().to_owned());
    names.filter(|name| name != "help").collect()
}

#[test]
fn every_command_that_is_shown_has_its_page() {
    let dir = tempfile::tempdir().unwrap();
    tidegate(&["man", dir.path().join("man8").to_str().unwrap()]);
    let mut expected = BTreeSet::from(["tidegate.8".to_owned(), "tidegated.8".to_owned()]);
    let first = commands(&[]);
    assert!(first.iter().any(|name| name == "up") && first.iter().any(|name| name == "init"));
    for command in first {
        expected.insert(format!("tidegate-{command}.8"));
        for below in commands(&[&command]) {
            expected.insert(format!("tidegate-{command}-{below}.8"));
        }
    }
    assert!(expected.contains("tidegate-init-mesh.8"), "{expected:?}");
    let pages = fs::read_dir(dir.path().join("man8")).unwrap();
    let found: BTreeSet<String> =
        pages.map(|page| page.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, expected);

    for name in found {
        let page = fs::read_to_string(dir.path().join("man8").join(&name)).unwrap();
        for section in
            ["NAME", "SYNOPSIS", "DESCRIPTION", "FILES", "\"SEE ALSO\"", "\"EXIT STATUS\""]
        {
            assert!(page.contains(&format!("\n.SH {section}\n")), "{name} without {section}");
        }
        assert!(page.is_ascii(), "{name} has characters that not all can show");
        assert!(page.contains("error in a config file"), "{name} without its exit codes");
    }
    let page = |name: &str| fs::read_to_string(dir.path().join("man8").join(name)).unwrap();
    assert!(page("tidegate-up.8").contains("WG_ENDPOINT_RESOLUTION_RETRIES"));
    assert!(page("tidegated.8").contains("WG_PROCESS_FOREGROUND"));
    assert!(page("tidegate.8").contains("\n.SH ENVIRONMENT\n"));
    assert!(!page("tidegate-genkey.8").contains("ENVIRONMENT"));
}

/// What bash completes behind words of a command line.
fn completed(words: &[&str]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("tidegate");
    fs::write(&script, tidegate(&["completions", "bash"]).stdout).unwrap();
    // As readline calls the function that the script registers.
    let program = r#"
        source "$1"; shift
        function=$(complete -p tidegate | sed 's/.*-F \([^ ]*\).*/\1/')
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
        "$function" tidegate "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", program, "bash"]).arg(&script).args(words);
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_options() {
    if Command::new("bash").arg("--version").output().is_err() {
        return report_skipped("bash_completes_commands_and_options", "needs bash(1)");
    }
    assert_eq!(completed(&["tidegate", "reloa"]), ["reload"]);
    assert_eq!(completed(&["tidegate", "init", "gate"]), ["gateway"]);
    assert_eq!(completed(&["tidegate", "up", "--dry"]), ["--dry-run"]);
    assert!(completed(&["tidegate", "up", "--mode", "n"]).contains(&"native".to_owned()));
    let all = completed(&["tidegate", ""]);
    assert!(all.contains(&"up".to_owned()), "{all:?}");
    for hidden in ["data", "completions", "man"] {
        assert!(!all.contains(&hidden.to_owned()), "{hidden} in {all:?}");
    }
}

#[test]
fn every_shell_gets_a_script() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = String::from_utf8(tidegate(&["completions", shell]).stdout).unwrap();
        assert!(script.contains("reload") && script.contains("bridge"), "{shell}");
        assert!(!script.contains("background-child"), "{shell} offers what is hidden");
    }
}

/// A listing of an archive, with modes, owners and times.
fn listing(archive: &Path) -> String {
    let mut tar = Command::new("tar");
    tar.env("TZ", "UTC").args(["--list", "--verbose", "--verbose", "--file"]).arg(archive);
    let output = tar.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_archive_has_everything_and_is_the_same_each_time() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Stands for the program, which takes long to compress.
    let program = other.path().join("program");
    let script = format!("#!/bin/bash\nexec -a \"$0\" '{TIDEGATE}' \"$@\"\n");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let epoch = 1_700_000_000;
    let contents = Contents { program: &program, licences: "Theirs.\n", epoch };
    let made = dist::pack(&contents, one.path()).unwrap();
    // A second time over the first, and somewhere else with other modes.
    let first = fs::read(&made.archive).unwrap();
    let made = dist::pack(&contents, one.path()).unwrap();
    assert!(fs::read(&made.archive).unwrap() == first, "it differs over an older one");
    fs::set_permissions(other.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let elsewhere = dist::pack(&contents, other.path()).unwrap();
    assert!(fs::read(&elsewhere.archive).unwrap() == first, "it differs elsewhere");

    let listing = listing(&made.archive);
    for line in listing.lines() {
        assert!(line.contains(" 0/0 ") && line.contains("2023-11-14 22:13"), "{line}");
    }
    for (mode, path) in [
        ("-rwxr-xr-x", "/bin/tidegate"),
        ("l", "/bin/tidegated -> tidegate"),
        ("-rw-r--r--", "/lib/systemd/system/tidegate@.service"),
        ("-rw-r--r--", "/share/man/man8/tidegate-up.8"),
        ("-rw-r--r--", "/share/bash-completion/completions/tidegate"),
        ("-rw-r--r--", "/share/zsh/site-functions/_tidegate"),
        ("-rw-r--r--", "/share/fish/vendor_completions.d/tidegate.fish"),
        ("-rw-r--r--", "/share/doc/tidegate/README.md"),
        ("-rw-r--r--", "/share/doc/tidegate/LICENSE-MIT"),
        ("-rw-r--r--", "/share/doc/tidegate/LICENSE-APACHE"),
        ("-rw-r--r--", "/share/doc/tidegate/LICENSES-OF-OTHERS"),
        ("-rw-r--r--", "/share/doc/tidegate/examples/mesh/server1.conf"),
    ] {
        let is_it = |line: &str| line.starts_with(mode) && line.ends_with(path);
        assert!(listing.lines().any(is_it), "{mode} {path} in\n{listing}");
    }
    let program = made.folder.join("bin/tidegated");
    let version = Command::new(program).arg("--version").output().unwrap();
    assert!(String::from_utf8(version.stdout).unwrap().starts_with("tidegated "));
}
