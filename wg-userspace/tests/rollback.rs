//! Commands that fail, are ended or are killed on their way, and such that meet.
//!
//! The namespaces are those of `common/sandbox.rs`. Debug builds fail, are told to end, or are killed at
//! the point that a variable names (`cli/points.rs`).

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "common/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Child, Output},
};

use sandbox::{DOWN, LIMIT, Sandbox, UP, errors, wait_until};
use xtask::lab;

const RELOAD: &str = "\"$TIDEGATE\" reload $F/tg0.conf";

/// A resolvconf(8) with one record for each interface, which is a file. It waits as long as there is a
/// file `wait`.
const RESOLVCONF: &str = r#"#!/bin/sh
cd "$(dirname "$0")/.."
while test -e wait; do touch waits; sleep 0.02; done
case "$1" in
-a) cat > "record.$2" ;;
-d) rm -f "record.$2" ;;
esac
"#;

/// Where little goes through the tunnel. Its second peer leaves in [`FULL`], where a third one has what
/// it owned.
const PLAIN: &str = "[Interface]\nPrivateKey = IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=\n\
    ListenPort = 51820\nFwMark = 5\nMTU = 1380\nAddress = 10.9.0.2/24, fd09::2/64\nDNS = 10.9.0.1\n\
    PostDown = touch $F/plain\n\
    [Peer]\nPublicKey = Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=\n\
    Endpoint = 198.51.100.2:51820\nAllowedIPs = 10.9.0.1/32, 10.3.0.0/16\n\
    [Peer]\nPublicKey = AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\nAllowedIPs = 10.4.0.0/16\n";

/// Where everything does.
const FULL: &str = "[Interface]\nPrivateKey = IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=\n\
    ListenPort = 51821\nAddress = 10.9.0.2/24, 10.7.0.2/24, fd09::2/60\nDNS = 10.9.0.3, lan\n\
    PostDown = touch $F/full\n\
    [Peer]\nPublicKey = Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=\n\
    PresharedKey = IiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiIiI=\nPersistentKeepalive = 25\n\
    Endpoint = 198.51.100.3:51820\nAllowedIPs = 0.0.0.0/0, ::/0, 10.1.0.0/16\n\
    [Peer]\nPublicKey = AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=\nAllowedIPs = 10.4.0.0/16\n";

/// As [`FULL`], but with other addresses under the same default routes.
fn elsewhere() -> String {
    FULL.replace("10.9.0.2/24, 10.7.0.2/24, fd09::2/60", "10.6.0.2/24, fd06::2/64")
}

fn write(sandbox: &Sandbox, text: &str) {
    let path = sandbox.path("tg0.conf");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn sandbox(test: &str) -> Option<Sandbox> {
    let sandbox = Sandbox::new(test)?;
    fs::create_dir_all(sandbox.path("bin")).unwrap();
    let path = sandbox.path("bin/resolvconf");
    fs::write(&path, RESOLVCONF).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Some(sandbox)
}

/// All that there is of the host and of the device. The order of addresses says who came first.
fn everything(sandbox: &Sandbox) -> String {
    let device = sandbox.ok("{ wg showconf tg0; wg show tg0 endpoints
           cat $F/record.* 2>/dev/null; } | sort || true");
    let mut lines: Vec<String> = sandbox.state().lines().map(str::to_owned).collect();
    for line in &mut lines {
        *line = line.replace(" tentative", "");
    }
    lines.sort();
    format!("{}\n{device}", lines.join("\n"))
}

/// Waits until everything is as expected: the daemon lets go of former sockets when it likes.
fn comes_to(sandbox: &Sandbox, expected: &str, why: &str) {
    let mut is = String::new();
    let outcome = lab::wait_for("the state of before", LIMIT, || {
        is = everything(sandbox);
        Ok((is == expected).then_some(()))
    });
    assert!(outcome.is_ok(), "{why}:\n{}", difference(expected, &is));
}

fn difference(expected: &str, is: &str) -> String {
    let only = |of: &str, other: &str| -> Vec<String> {
        of.lines().filter(|line| !other.lines().any(|l| l == *line)).map(str::to_owned).collect()
    };
    format!("missing: {:#?}\nnew: {:#?}", only(expected, is), only(is, expected))
}

/// Two files, and what there is when the first and when the second was carried out.
struct Pair<'a> {
    sandbox: &'a Sandbox,
    files: [&'a str; 2],
    states: [String; 2],
}

impl<'a> Pair<'a> {
    /// Brings the interface up by the first file.
    fn up(sandbox: &'a Sandbox, files: [&'a str; 2]) -> Pair<'a> {
        write(sandbox, files[0]);
        sandbox.ok(UP);
        let mut pair = Pair { sandbox, files, states: Default::default() };
        // The link's own address and the daemon's processes are others each time.
        for which in [1, 0] {
            pair.reload(which);
            pair.states[which] = pair.settled();
        }
        pair
    }

    /// What there is when nothing changes any more.
    fn settled(&self) -> String {
        let mut before = everything(self.sandbox);
        let settled = lab::wait_for("rest", LIMIT, || {
            std::thread::sleep(std::time::Duration::from_millis(150));
            let is = everything(self.sandbox);
            Ok((is == std::mem::replace(&mut before, is.clone())).then_some(is))
        });
        settled.unwrap()
    }

    fn reload(&self, which: usize) {
        write(self.sandbox, self.files[which]);
        self.sandbox.ok(RELOAD);
    }

    /// Reloads with the second file and a variable; gives what came of it.
    fn with(&self, variable: &str) -> Output {
        write(self.sandbox, self.files[1]);
        self.sandbox.sh(&format!("export {variable}; exec {RELOAD}"))
    }

    fn comes_to(&self, which: usize, why: &str) {
        comes_to(self.sandbox, &self.states[which], why);
    }

    /// The file is in force, and the ledger knows it.
    fn is_in_force(&self, which: usize, why: &str) {
        self.comes_to(which, why);
        write(self.sandbox, self.files[which]);
        let said = self.sandbox.ok(RELOAD);
        assert!(said.ends_with("nothing to do\n"), "{why}: {said}");
    }
}

fn a_reload_that_fails_or_is_ended(test: &str, files: [&str; 2]) {
    let Some(sandbox) = sandbox(test) else { return };
    let before = sandbox.state();
    let pair = Pair::up(&sandbox, files);
    let mut last = 0;
    for at in 1.. {
        let output = pair.with(&format!("TIDEGATE_TEST_FAIL_AT={at}"));
        if output.status.success() {
            break;
        }
        last = at;
        let told = errors(&output);
        assert!(
            told.contains(&format!("a test lets it fail at point {at}; everything is as it was"))
        );
        let why = format!("failed at {at}: {told}");
        pair.comes_to(0, &why);
        if at % 5 == 0 {
            pair.is_in_force(0, &why);
        }
    }
    println!("{test}: {last} points");
    assert!(last > 20, "{last}");
    pair.is_in_force(1, "it did not fail");
    pair.reload(0);
    for at in 1..=last {
        let output = pair.with(&format!("TIDEGATE_TEST_SIGNAL_AT={at}"));
        let told = errors(&output);
        if output.status.success() {
            // Nobody waits for anything after the last steps.
            pair.is_in_force(1, &told);
            pair.reload(0);
        } else {
            assert!(told.contains("interrupted; everything is as it was before"), "{told}");
        }
        pair.comes_to(0, &format!("ended at {at}: {told}"));
    }
    pair.is_in_force(0, "after all");
    sandbox.ok(DOWN);
    assert_eq!(sandbox.state(), before);
}

#[test]
fn a_reload_that_fails_or_is_ended_adds_nothing() {
    a_reload_that_fails_or_is_ended("a_reload_that_fails_or_is_ended_adds_nothing", [PLAIN, FULL]);
}

#[test]
fn a_reload_that_fails_or_is_ended_takes_nothing() {
    a_reload_that_fails_or_is_ended("a_reload_that_fails_or_is_ended_takes_nothing", [FULL, PLAIN]);
}

#[test]
fn a_reload_that_fails_or_is_ended_moves_nothing() {
    a_reload_that_fails_or_is_ended(
        "a_reload_that_fails_or_is_ended_moves_nothing",
        [FULL, &elsewhere()],
    );
}

/// What is tried after a kill: to go back, to go on, or to end it all.
fn a_killed_reload(test: &str, files: [&str; 2]) {
    let Some(sandbox) = sandbox(test) else { return };
    let before = sandbox.state();
    let mut pair = Pair::up(&sandbox, files);
    for at in 1.. {
        let output = pair.with(&format!("TIDEGATE_TEST_STOP_AT={at}"));
        if output.status.success() {
            println!("{test}: {} points", at - 1);
            assert!(at > 20, "{at}");
            break;
        }
        let why = format!("killed at {at}");
        pair.reload(0);
        pair.is_in_force(0, &why);
        pair.with(&format!("TIDEGATE_TEST_STOP_AT={at}"));
        pair.reload(1);
        pair.is_in_force(1, &why);
        pair.reload(0);
        pair.comes_to(0, &why);
        if at % 4 == 0 {
            pair.with(&format!("TIDEGATE_TEST_STOP_AT={at}"));
            sandbox.ok(DOWN);
            assert_eq!(sandbox.state(), before, "{why}");
            assert_eq!(sandbox.ok("cat $F/record.* 2>/dev/null || true"), "", "{why}");
            pair = Pair::up(&sandbox, files);
        }
    }
    sandbox.ok(DOWN);
    assert_eq!(sandbox.state(), before);
}

#[test]
fn a_killed_reload_that_adds_can_be_taken_back_or_finished() {
    a_killed_reload("a_killed_reload_that_adds_can_be_taken_back_or_finished", [PLAIN, FULL]);
}

#[test]
fn a_killed_reload_that_takes_can_be_taken_back_or_finished() {
    a_killed_reload("a_killed_reload_that_takes_can_be_taken_back_or_finished", [FULL, PLAIN]);
}

#[test]
fn a_killed_reload_that_moves_can_be_taken_back_or_finished() {
    let test = "a_killed_reload_that_moves_can_be_taken_back_or_finished";
    a_killed_reload(test, [FULL, &elsewhere()]);
}

#[test]
fn a_reload_that_is_killed_while_it_takes_back_leaves_what_another_one_mends() {
    let test = "a_reload_that_is_killed_while_it_takes_back_leaves_what_another_one_mends";
    let Some(sandbox) = sandbox(test) else { return };
    let before = sandbox.state();
    for files in [[PLAIN, FULL], [FULL, PLAIN]] {
        let pair = Pair::up(&sandbox, files);
        let fails = |at: u32| {
            let output = pair.with(&format!("TIDEGATE_TEST_FAIL_AT={at}"));
            !output.status.success()
        };
        let last = (1..).take_while(|&at| fails(at)).last().unwrap();
        pair.reload(0);
        for at in last + 1.. {
            let both = format!("TIDEGATE_TEST_FAIL_AT={last} TIDEGATE_TEST_STOP_AT={at}");
            let output = pair.with(&both);
            if errors(&output).contains("everything is as it was before") {
                assert!(at > last + 20, "{at}");
                break;
            }
            let which = at as usize % 2;
            pair.reload(which);
            pair.is_in_force(which, &format!("killed at {at}"));
            pair.reload(0);
        }
        sandbox.ok(DOWN);
        assert_eq!(sandbox.state(), before);
    }
}

#[test]
fn what_is_in_the_way_of_a_reload_stays_and_nothing_else_is_done() {
    let test = "what_is_in_the_way_of_a_reload_stays_and_nothing_else_is_done";
    let Some(sandbox) = sandbox(test) else { return };
    let pair = Pair::up(&sandbox, [PLAIN, FULL]);
    for (way, back) in [
        ("ip route add 10.1.0.0/16 via 198.51.100.2", "ip route del 10.1.0.0/16 via 198.51.100.2"),
        // There is nothing yet that a filter could have to be deleted.
        (
            "printf '#!/bin/sh\\ntest \"$1\" = list || exit 9\\n' > $F/bin/nft
             chmod 755 $F/bin/nft",
            "rm $F/bin/nft",
        ),
    ] {
        sandbox.ok(way);
        let in_the_way = everything(&sandbox);
        write(&sandbox, FULL);
        let told = sandbox.fails(1, RELOAD);
        assert!(told.contains("everything is as it was before"), "{told}");
        comes_to(&sandbox, &in_the_way, &told);
        sandbox.ok(back);
        pair.is_in_force(0, &told);
    }
    sandbox.ok(DOWN);
}

#[test]
fn an_address_of_somebody_else_is_not_taken_over_by_a_reload_that_fails() {
    let test = "an_address_of_somebody_else_is_not_taken_over_by_a_reload_that_fails";
    let Some(sandbox) = sandbox(test) else { return };
    let pair = Pair::up(&sandbox, [PLAIN, FULL]);
    sandbox.ok("ip addr add 10.7.0.2/24 dev tg0");
    let by_hand = everything(&sandbox);
    // After the last step.
    let fails = |at: u32| !pair.with(&format!("TIDEGATE_TEST_FAIL_AT={at}")).status.success();
    let last = (1..).take_while(|&at| fails(at)).last().unwrap();
    pair.reload(0);
    // It was taken over by the reload that did not fail, and went with the one back.
    sandbox.ok("ip addr add 10.7.0.2/24 dev tg0");
    assert!(fails(last));
    comes_to(&sandbox, &by_hand, "failed");
    write(&sandbox, PLAIN);
    sandbox.ok(RELOAD);
    comes_to(&sandbox, &by_hand, "it is nobody's but the one's who has set it");
    sandbox.ok(DOWN);
}

#[test]
fn half_an_up_is_not_reloaded() {
    let Some(sandbox) = sandbox("half_an_up_is_not_reloaded") else { return };
    write(&sandbox, FULL);
    let before = sandbox.state();
    // The daemon runs, and has an address.
    sandbox.sh(&format!("export TIDEGATE_TEST_STOP_AT=12; exec {UP}"));
    let told = sandbox.fails(5, RELOAD);
    assert!(told.contains("use `tidegate down`, then `up`"), "{told}");
    sandbox.ok(DOWN);
    assert_eq!(sandbox.state(), before);
}

/// Starts commands at the same moment; gives their codes, sorted, and what they said.
fn at_once(sandbox: &Sandbox, scripts: &[&str]) -> (Vec<Option<i32>>, String) {
    let start = |script: &&str| sandbox.command(&format!("exec {script}")).spawn().unwrap();
    let children: Vec<Child> = scripts.iter().map(start).collect();
    let ended = children.into_iter().map(|child| child.wait_with_output().unwrap());
    let (mut codes, mut said) = (Vec::new(), String::new());
    for output in ended {
        codes.push(output.status.code());
        said += &errors(&output);
    }
    (codes, said)
}

#[test]
fn of_two_that_meet_one_wins() {
    let Some(sandbox) = sandbox("of_two_that_meet_one_wins") else { return };
    write(&sandbox, FULL);
    let before = sandbox.state();
    for _ in 0..8 {
        let (mut codes, said) = at_once(&sandbox, &[UP, UP, UP]);
        codes.sort_unstable();
        assert_eq!(codes, [Some(0), Some(5), Some(5)], "{said}");
        assert!(!said.contains("undo"), "{said}");
        let (codes, said) = at_once(&sandbox, &[DOWN, UP]);
        let is_up = codes[1] == Some(0);
        assert!(codes[0] == Some(0) && (is_up || codes[1] == Some(5)), "{codes:?} {said}");
        if !is_up {
            assert_eq!(sandbox.state(), before, "{said}");
            sandbox.ok(UP);
        }
        write(&sandbox, PLAIN);
        let (codes, said) = at_once(&sandbox, &[RELOAD, RELOAD]);
        assert!(codes.contains(&Some(0)), "{codes:?} {said}");
        assert!(codes.iter().all(|code| [Some(0), Some(5)].contains(code)), "{codes:?} {said}");
        assert!(sandbox.ok(RELOAD).ends_with("nothing to do\n"), "{said}");
        write(&sandbox, FULL);
        let (codes, said) = at_once(&sandbox, &[RELOAD, DOWN]);
        if codes[1] == Some(5) {
            assert_eq!(codes[0], Some(0), "{said}");
            sandbox.ok(DOWN);
        } else {
            assert!(codes[1] == Some(0) && [Some(0), Some(5)].contains(&codes[0]), "{said}");
        }
        assert_eq!(sandbox.state(), before, "{said}");
        sandbox.ok(UP);
        let (mut codes, said) = at_once(&sandbox, &[DOWN, DOWN]);
        codes.sort_unstable();
        assert_eq!(codes, [Some(0), Some(5)], "{said}");
        assert_eq!(sandbox.state(), before, "{said}");
    }
}

#[test]
fn who_comes_while_another_is_at_work_says_so_and_does_nothing() {
    let test = "who_comes_while_another_is_at_work_says_so_and_does_nothing";
    let Some(sandbox) = sandbox(test) else { return };
    let before = sandbox.state();
    let others = |begun: &str| {
        fs::write(sandbox.path("wait"), "").unwrap();
        let _ = fs::remove_file(sandbox.path("waits"));
        let first = sandbox.command(&format!("exec {begun}")).spawn().unwrap();
        wait_until(|| sandbox.path("waits").exists());
        for other in [UP, DOWN, RELOAD, "\"$TIDEGATE\" save $F/tg0.conf"] {
            let told = sandbox.fails(5, other);
            let is_said = told.contains("another `tidegate` is at work on it")
                || (other == UP && told.contains("the interface exists already"));
            assert!(is_said, "{other} during {begun}: {told}");
        }
        // Nor does one of another interface undo what is not done yet.
        sandbox.fails(5, "\"$TIDEGATE\" down $F/tg1.conf");
        fs::remove_file(sandbox.path("wait")).unwrap();
        let output = first.wait_with_output().unwrap();
        assert!(output.status.success(), "{begun}: {}", errors(&output));
    };
    write(&sandbox, PLAIN);
    others(UP);
    write(&sandbox, FULL);
    others(RELOAD);
    assert!(sandbox.ok(RELOAD).ends_with("nothing to do\n"));
    others_of_down(&sandbox);
    assert_eq!(sandbox.state(), before);
}

/// The interface is gone already when `down` waits for the resolver.
fn others_of_down(sandbox: &Sandbox) {
    fs::write(sandbox.path("wait"), "").unwrap();
    fs::remove_file(sandbox.path("waits")).unwrap();
    let down = sandbox.command(&format!("exec {DOWN}")).spawn().unwrap();
    wait_until(|| sandbox.path("waits").exists());
    for other in [UP, DOWN, RELOAD] {
        sandbox.fails(5, other);
    }
    fs::remove_file(sandbox.path("wait")).unwrap();
    assert!(down.wait_with_output().unwrap().status.success());
}

#[test]
fn a_daemon_that_nobody_waits_for_any_more_leaves_nothing() {
    let test = "a_daemon_that_nobody_waits_for_any_more_leaves_nothing";
    let Some(sandbox) = sandbox(test) else { return };
    write(&sandbox, PLAIN);
    let before = sandbox.state();
    for point in ["begin", "middle", "end"] {
        // What it was started from is killed by it, so that there is no moment at which it is too late.
        let output = sandbox.sh(&format!("export TIDEGATE_TEST_ORPHAN_AT={point}; exec {UP}"));
        assert_eq!(output.status.code(), None, "{point}: {}", errors(&output));
        let state = || sandbox.state().replace("/run/tidegate/tg0.state\n", "");
        let gone =
            lab::wait_for("the daemon's end", LIMIT, || Ok((state() == before).then_some(())));
        assert!(gone.is_ok(), "{point}: {}", difference(&before, &state()));
        // By itself, or for another command.
        let is_first = point == "begin";
        let told = errors(&sandbox.sh(if is_first { DOWN } else { UP }));
        assert!(told.contains("undoing what a process that was killed has left"), "{told}");
        if !is_first {
            sandbox.ok(DOWN);
        }
        assert_eq!(sandbox.state(), before, "{point}");
    }
    // A daemon without a file is the same.
    let run = "exec \"$TIDEGATE\" run tg1";
    for point in ["begin", "middle", "end"] {
        sandbox.sh(&format!("export TIDEGATE_TEST_ORPHAN_AT={point}; {run}"));
        wait_until(|| sandbox.state() == before);
    }
}
