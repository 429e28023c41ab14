//! What the program says when something is wrong, all of it in one place: each text says what failed,
//! where, and what to do (CONTRIBUTING.md).
//!
//! The texts are in `tests/texts/*.snap`; who changes one reads the others as well.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "common/sandbox.rs"]
mod sandbox;

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use sandbox::{Sandbox, TIDEGATE};

const KEY: &str = "PrivateKey = IBwCMKG0IAvhlcZPDahVK2eDM/zI9yt7lBt7QJh8l1E=\n";
const PEER: &str = "[Peer]\n#! Name = laptop\n\
                    PublicKey = Dxb2eCff3wMzKu1p6E3nSAuuVwHtZ+tfrfHK1wXNl00=\n\
                    AllowedIPs = 10.9.0.2/32\n";

/// What goes wrong with arguments and files alone. `tidegate` is the program, and `.` a folder with the
/// files of [`files`].
const ARGUMENTS: &[&str] = &[
    "tidegate shwo",
    "tidegate run a/b",
    "tidegate run tgt0 tgt0",
    "tidegate run tgt0 --log loud",
    "tidegate run tgt0 --xdp a:b",
    "tidegate run tgt0 --peer-source tcp:1",
    "tidegate run tgt0 --peer-source unix:peers.sock",
    "tidegate run tgt0 --workers 0",
    "tidegate up ./notes.txt",
    "tidegate up ./this-name-is-too-long.conf",
    "tidegate up ./none.conf",
    "tidegate up empty/none.conf",
    "tidegate up ./latin1.conf",
    "tidegate up ./folder.conf",
    "tidegate up ./typo.conf",
    "tidegate up ./later.conf",
    "tidegate up ./table.conf",
    "tidegate check ./none.conf",
    "tidegate check ./none.conf ./other.conf ./tgt0.conf",
    "tidegate strip ./none.conf",
    "tidegate trace tgt0 10.9.0.0/24 192.0.2.1",
    "tidegate trace tgt0 10.9.0 192.0.2.1",
    "tidegate trace tgt0 10.9.0.2 192.0.2.1:443",
    "tidegate trace tgt0 10.9.0.2 192.0.2.1:443/sctp",
    "tidegate trace tgt0 10.9.0.2 192.0.2.1:443/icmp",
    "tidegate trace tgt0 10.9.0.2 2001:db8::1",
    "tidegate pubkey < /dev/null",
    "echo SECRET! | tidegate pubkey",
    "tidegate peer add ./none.conf phone",
    "tidegate peer add ./tgt0.conf 'no #1'",
    "tidegate peer add ./tgt0.conf laptop --endpoint a.example",
    "tidegate peer add ./tgt0.conf phone",
    "tidegate peer add ./tgt0.conf phone --endpoint http://a.example",
    "tidegate peer add ./tgt0.conf phone --public-key short",
    "tidegate peer add ./tgt0.conf phone --public-key $(tidegate pubkey < key)",
    "tidegate peer add ./tgt0.conf phone --endpoint a.example --allowed-ips 10.9.0.1/32",
    "tidegate peer add ./tgt0.conf phone --endpoint a.example --allowed-ips 10.9.0.2/32",
    "tidegate peer add ./tgt0.conf phone --endpoint a.example --allowed-ips 10.8.0.0/24",
    "tidegate peer add ./tgt0.conf phone --endpoint a.example --out typo.conf",
    "tidegate peer add ./full.conf phone --endpoint a.example",
    "tidegate peer add ./alone.conf phone --endpoint a.example",
    "tidegate peer add ./random.conf phone --endpoint a.example",
    "tidegate peer remove ./tgt0.conf tablet",
    "tidegate init gateway",
    "tidegate init gateway --endpoint gw.example.org new > out; \
     tidegate init gateway --endpoint gw.example.org new",
    "tidegate init gateway --endpoint gw.example.org --network 10.9.0.0/30 --clients a,b,c other",
    "tidegate init gateway --endpoint gw.example.org --network 10.9.0.1/24 other",
    "tidegate init gateway --endpoint gw.example.org --out a/b other",
];

/// What goes wrong with a host, in the order in which it is tried.
const HOST: &[&str] = &[
    "tidegate show tg9",
    "tidegate trace tg9 10.9.0.2 192.0.2.1",
    "tidegate down tg9",
    "tidegate down outer",
    "tidegate reload ./tg9.conf",
    "tidegate save ./tg9.conf",
    "tidegate quiesce tg9",
    "tidegate run outer",
    "tidegate up ./tg9.conf --mode zerocopy --xdp outer",
    "mkdir -p /run/wireguard/tg9.sock; tidegate run tg9; rmdir /run/wireguard/tg9.sock",
    "mkdir /run/empty; unshare --mount sh -c 'mount --bind /run/empty /dev/net; exec tidegate up ./tg9.conf'",
    "setpriv --bounding-set=-all --inh-caps=-all -- tidegate up ./tg9.conf",
    "chmod 0 tg9.conf; setpriv --bounding-set=-all --inh-caps=-all -- tidegate up ./tg9.conf; chmod 600 tg9.conf",
    "tidegate up ./hook.conf",
    "WG_ENDPOINT_RESOLUTION_RETRIES=0 tidegate up ./name.conf",
    "tidegate up ./default.conf",
    "PATH=bin tidegate up ./route.conf",
    "PATH=bin tidegate up ./dns.conf; tidegate down dns",
    "tidegate up ./tg9.conf > up; tidegate up ./tg9.conf",
    "tidegate run tg9",
    "tidegate up ./port.conf",
    "flock /run/tidegate/tg9.state tidegate down tg9",
    "unshare --net tidegate down tg9",
    "unshare --net tidegate reload ./tg9.conf",
    "cp tg9.conf good; cat hook.conf >> tg9.conf; tidegate reload ./tg9.conf; cp good tg9.conf",
    "sed -i 's/10.9.0.1/10.9.0.9/; s/Port = 5182/Port = 5183/' tg9.conf; tidegate peer remove tg9 laptop",
    "sed -i.good '1s/\"version\":[0-9]*/\"version\":99/' /run/tidegate/tg9.state; tidegate down tg9; \
     mv /run/tidegate/tg9.state.good /run/tidegate/tg9.state",
    "tidegate down tg9; tidegate run tg9; cp good tg9.conf; tidegate reload ./tg9.conf; tidegate down tg9",
];

/// Writes the files that the lines name.
fn files(folder: &Path) {
    let write = |name: &str, text: &[u8]| {
        use std::os::unix::fs::PermissionsExt;
        fs::write(folder.join(name), text).unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    let config = |lines: &str, peer: &str| format!("[Interface]\n{KEY}{lines}\n{peer}");
    let usual = "Address = 10.9.0.1/24\nListenPort = 51820\n";
    let far = PEER.replace("AllowedIPs", "Endpoint = no-such-host.example:1\nAllowedIPs");
    let all = PEER.replace("10.9.0.2/32", "0.0.0.0/0");
    for (name, text) in [
        ("tgt0.conf", config(usual, PEER)),
        ("tg9.conf", config(usual, PEER)),
        ("typo.conf", config("Adress = 10.9.0.1/24\n", "")),
        ("later.conf", config("#! Metrics = 127.0.0.1:9586\n", "")),
        ("table.conf", config("Address = 10.9.0.1/24\nTable = no-such-table\n", PEER)),
        ("full.conf", config("Address = 10.9.0.1/30\nListenPort = 51820\n", PEER)),
        ("alone.conf", config("Address = 10.9.0.1/32\nListenPort = 51820\n", "")),
        ("random.conf", config("Address = 10.9.0.1/24\n", "")),
        ("hook.conf", config("PostUp = exit 7\n", "")),
        ("name.conf", config("Address = 10.9.0.1/24\n", &far)),
        ("default.conf", config("Address = 10.9.0.1/24\n", PEER)),
        ("route.conf", config("Address = 10.9.0.1/24\n", &all)),
        ("dns.conf", config("Address = 10.9.0.1/24\nDNS = 10.9.0.53\n", "")),
        ("port.conf", config("ListenPort = 51820\n", "")),
    ] {
        write(name, text.as_bytes());
    }
    write("latin1.conf", b"[Interface]\n# Caf\xe9\n");
    write("notes.txt", b"");
    write("key", KEY.strip_prefix("PrivateKey = ").unwrap().as_bytes());
    for name in ["folder.conf", "empty", "bin", "server"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    std::os::unix::fs::symlink(TIDEGATE, folder.join("bin/tidegate")).unwrap();
}

/// What lines of shell print, as it is kept; asserts what holds for each.
fn transcript(lines: &[&str], folder: &Path, run: impl Fn(&str) -> Output) -> String {
    let mut text = String::new();
    for line in lines {
        let output = run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        let said = said.replace(&format!("{}/", folder.display()), "./");
        assert!(!said.is_empty(), "`{line}` says nothing");
        assert!(!said.contains("IBwCMKG0IAvhl") && !said.contains("SECRET"), "{said}");
        writeln!(text, "$ {line}\n{said}").unwrap();
    }
    text
}

/// Compares with what was kept.
fn keep(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/texts"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn wrong_arguments_and_files_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    files(folder.path());
    let bin = folder.path().join("bin");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let text = transcript(ARGUMENTS, folder.path(), |line| {
        let mut command = Command::new("sh");
        command.args(["-c", line]).current_dir(folder.path()).stdin(Stdio::null());
        for name in
            ["LOG_LEVEL", "TIDEGATE_XDP", "TIDEGATE_MODE", "TIDEGATE_AEAD", "TIDEGATE_WORKERS"]
        {
            command.env_remove(name);
        }
        command.env("PATH", &path).env("LC_ALL", "C").output().unwrap()
    });
    keep("arguments", &text);
}

#[test]
fn what_a_host_refuses_is_explained() {
    const NAME: &str = "what_a_host_refuses_is_explained";
    if let Some(missing) =
        ["setpriv", "flock"].into_iter().find(|name| xtask::lab::find_program(name).is_none())
    {
        println!("SKIPPED {NAME}: needs the program `{missing}`");
        return;
    }
    let Some(sandbox) = Sandbox::new(NAME) else { return };
    let folder = sandbox.path("up").parent().unwrap().to_path_buf();
    files(&folder);
    // A name server that refuses at once.
    sandbox.ok("echo nameserver 127.0.0.1 > $F/resolv.conf
         mount --bind $F/resolv.conf /etc/resolv.conf");
    let text = transcript(HOST, &folder, |line| {
        sandbox.command(&format!("cd $F; {line}")).output().unwrap()
    });
    keep("host", &text);
}
