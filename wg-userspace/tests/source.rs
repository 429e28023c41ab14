//! Peers that are pulled when they knock, between real processes.
//!
//! ```text
//!  client                                    gateway
//!  boringtun or Tidegate ══ outer (veth) ══ Tidegate without peers ── Unix socket ── a service, here
//!  10.9.0.2, fd09::2                         10.9.0.1, fd09::1
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde_json::{Value, json};
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER, Programs, spawn_peer},
    lab::{self, GATEWAY_V4, Lab, Process, Space},
};

const LIMIT: Duration = Duration::from_secs(10);
const UDP: &[&str] = &["--mode", "udp"];

/// What a test needs, unless it must be skipped.
fn lab(test: &str) -> Option<(Lab, Programs)> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some((Lab::new().unwrap(), Programs::in_folder(tidegate().parent().unwrap()).unwrap()))
}

fn tidegate() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tidegate"))
}

/// A service that knows peers: a thread behind a Unix socket, one connection after the other.
struct Service {
    path: PathBuf,
    peers: Arc<Peers>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Peers {
    /// Bodies by the key in the path.
    known: BTreeMap<String, Value>,
    /// The first lines of all requests.
    asked: Mutex<Vec<String>>,
    /// Timestamps by the key in the path.
    kept: Mutex<BTreeMap<String, String>>,
}

impl Service {
    fn start(path: PathBuf, peers: &[Value]) -> Service {
        let listener = UnixListener::bind(&path).unwrap();
        let known = peers.iter().map(|peer| {
            let key = peer["public_key"].as_str().unwrap();
            let in_path = key.replace('+', "-").replace('/', "_").replace('=', "");
            (in_path, peer.clone())
        });
        let peers = Arc::new(Peers { known: known.collect(), ..Peers::default() });
        let stop = Arc::new(AtomicBool::new(false));
        let (serving, stopped) = (Arc::clone(&peers), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                // Who broke off gets no answer.
                let _ = serving.answer(stream);
            }
        });
        Service { path, peers, stop, thread: Some(thread) }
    }

    fn asked(&self) -> Vec<String> {
        self.peers.asked.lock().unwrap().clone()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.path);
        let _ = self.thread.take().unwrap().join();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Peers {
    fn answer(&self, stream: UnixStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream);
        let (mut first, mut body_len) = (String::new(), 0);
        reader.read_line(&mut first)?;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let line = line.trim().to_ascii_lowercase();
            if let Some(len) = line.strip_prefix("content-length:") {
                body_len = len.trim().parse().unwrap();
            } else if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; body_len];
        reader.read_exact(&mut body)?;
        let words: Vec<&str> = first.split_whitespace().collect();
        let path = words[1].strip_prefix("/v1/peers/").unwrap();
        let (status, answer) = match (words[0], path.split_once('/')) {
            ("GET", None) => match self.known.get(path) {
                Some(peer) => ("200 OK", peer.to_string()),
                None => ("404 Not Found", String::new()),
            },
            ("PUT", Some((key, "timestamp"))) => {
                let timestamp = String::from_utf8(body).unwrap();
                self.kept.lock().unwrap().insert(key.to_owned(), timestamp);
                ("204 No Content", String::new())
            }
            _ => ("400 Bad Request", String::new()),
        };
        self.asked.lock().unwrap().push(first.trim().to_owned());
        let stream = reader.get_mut();
        write!(stream, "HTTP/1.1 {status}\r\n")?;
        if !answer.is_empty() {
            write!(stream, "Content-Length: {}\r\n", answer.len())?;
        }
        write!(stream, "\r\n{answer}")
    }
}

/// `tidegate run -f` in a namespace.
struct Daemon<'a> {
    space: &'a Space,
    interface: String,
    process: Process,
}

impl<'a> Daemon<'a> {
    fn start(space: &'a Space, interface: &str, options: &[&str]) -> Daemon<'a> {
        let mut command = space.command(tidegate());
        command.args(["run", "-f", interface]).args(UDP).args(options);
        let mut process = space.spawn("tidegate-run", &mut command).unwrap();
        lab::wait_for("the daemon", LIMIT, || {
            let ended = process.ended()?;
            anyhow::ensure!(ended.is_none(), "it ended: {}", process.errors());
            Ok(process.errors().contains("is ready").then_some(()))
        })
        .unwrap();
        Daemon { space, interface: interface.to_owned(), process }
    }

    /// Gives the daemon what a `wg0.conf` says, and the interface its addresses.
    fn configure(&self, lab: &Lab, conf: &str) {
        let keys: Vec<&str> =
            conf.lines().filter(|line| !line.trim_start().starts_with("Address")).collect();
        let file = lab.write(&format!("{}.set", self.interface), &keys.join("\n")).unwrap();
        self.wg(&["setconf", &self.interface, file.to_str().unwrap()]);
        self.space.configure(&self.interface, conf).unwrap();
    }

    fn wg(&self, arguments: &[&str]) -> String {
        self.space.run("wg", arguments).unwrap()
    }

    /// The fields of the peers in `wg show IF dump`, a line each.
    fn peers(&self) -> Vec<Vec<String>> {
        let text = self.wg(&["show", &self.interface, "dump"]);
        let fields = |line: &str| line.split('\t').map(str::to_owned).collect();
        text.lines().skip(1).map(fields).collect()
    }

    /// A number of `tidegate show`: a place in the data path, as a JSON pointer.
    fn number(&self, pointer: &str) -> u64 {
        let text = self.space.run(tidegate(), &["show", &self.interface, "--json"]).unwrap();
        let shown: Value = serde_json::from_str(&text).unwrap();
        let number = shown.pointer(&format!("/interfaces/0/data_path/{pointer}"));
        number.and_then(Value::as_u64).unwrap_or(0)
    }
}

/// A `wg0.conf` without its peers.
fn without_peers(conf: &str) -> &str {
    &conf[..conf.find("[Peer]").unwrap()]
}

fn value<'a>(conf: &'a str, key: &str) -> &'a str {
    lab::conf_values(conf, key)[0]
}

/// What the service knows of the client.
fn client_as_known() -> Value {
    json!({
        "public_key": value(GATEWAY_CONF, "PublicKey"),
        "preshared_key": value(GATEWAY_CONF, "PresharedKey"),
        "allowed_ips": ["10.9.0.2/32", "fd09::2/128"],
    })
}

fn source_option(path: &Path) -> String {
    format!("--peer-source=unix:{}", path.display())
}

fn assert_answered(space: &Space) {
    for to in GATEWAY_INNER {
        let ping = space.ping(to, 5, &[]).unwrap();
        assert!(ping.answered >= 4, "{to}: {ping:?}");
    }
}

#[test]
fn a_peer_is_pulled_when_it_knocks() {
    let Some((lab, programs)) = lab("a_peer_is_pulled_when_it_knocks") else { return };
    let service = Service::start(lab.path("peers.sock"), &[client_as_known()]);
    let option = source_option(&service.path);
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), &[&option]);
    gateway.configure(&lab, without_peers(GATEWAY_CONF));
    assert!(gateway.peers().is_empty());

    let mut client = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    client.event("handshake", LIMIT).unwrap();
    assert_answered(&lab.client);

    // As if it had been configured, with the preshared key of the source.
    let peers = gateway.peers();
    let known = client_as_known();
    assert_eq!(peers.len(), 1);
    let shown = [0, 1, 3].map(|field| peers[0][field].as_str());
    let [key, preshared] = ["public_key", "preshared_key"].map(|name| known[name].as_str());
    assert_eq!(shown, [key.unwrap(), preshared.unwrap(), "10.9.0.2/32,fd09::2/128"]);
    assert_eq!(gateway.number("peer_source/known"), 1);
    assert_eq!(gateway.number("peer_source/pulled_peers"), 1);

    // It is in no file, and neither taken for one that was removed nor saved.
    let file = format!("{}.conf", gateway.interface);
    let file = lab.write(&file, without_peers(GATEWAY_CONF)).unwrap();
    let file = file.to_str().unwrap();
    let said = lab.gateway.run(tidegate(), &["reload", file]).unwrap();
    assert!(said.ends_with(": nothing to do\n"), "{said}");
    lab.gateway.run(tidegate(), &["save", file]).unwrap();
    assert_eq!(std::fs::read_to_string(file).unwrap(), without_peers(GATEWAY_CONF));
    assert_eq!(gateway.peers()[0][0], peers[0][0]);

    // Its timestamp is kept once it has proved that it is there.
    let kept = lab::wait_for("the timestamp", LIMIT, || {
        Ok(service.peers.kept.lock().unwrap().values().next().cloned())
    });
    let kept = kept.unwrap();
    assert!(kept.len() == 24 && kept.starts_with("40000000"), "{kept}");
    let asked = service.asked();
    let gets = asked.iter().filter(|line| line.starts_with("GET ")).count();
    assert_eq!(gets, 1, "{asked:?}");
}

#[test]
fn a_sender_that_nobody_knows_gets_nothing_and_is_counted() {
    let test = "a_sender_that_nobody_knows_gets_nothing_and_is_counted";
    let Some((lab, _)) = lab(test) else { return };
    let service = Service::start(lab.path("peers.sock"), &[]);
    let option = source_option(&service.path);
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), &[&option]);
    gateway.configure(&lab, without_peers(GATEWAY_CONF));
    let stranger = Daemon::start(&lab.client, &lab.interface('s'), &[]);
    stranger.configure(&lab, CLIENT_CONF);

    let ping = lab.client.ping(GATEWAY_INNER[0], 3, &[]).unwrap();
    assert_eq!(ping.answered, 0);
    // The retry, five seconds after the first initiation, is refused without a question.
    lab::wait_for("refusals", LIMIT, || {
        Ok((gateway.number("drops/unknown_peer") >= 2).then_some(()))
    })
    .unwrap();
    assert_eq!((service.asked().len(), gateway.peers().len()), (1, 0));
    assert_eq!(stranger.peers()[0][4], "0", "a handshake");
    assert_eq!(gateway.number("peer_source/unknown"), 1);
}

#[test]
fn a_source_that_is_down_harms_no_configured_peer() {
    let test = "a_source_that_is_down_harms_no_configured_peer";
    let Some((lab, programs)) = lab(test) else { return };
    let path = lab.path("peers.sock");
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), &[&source_option(&path)]);
    gateway.configure(&lab, GATEWAY_CONF);
    let _client = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    assert_answered(&lab.client);

    // Another one knocks, whom only the source could know.
    let stranger = Daemon::start(&lab.client, &lab.interface('s'), &[]);
    let private_key = stranger.wg(&["genkey"]);
    let file = lab.write("stranger.key", &private_key).unwrap();
    let script = format!("wg pubkey < {}", file.display());
    let public_key = lab.client.run("sh", &["-c", &script]).unwrap().trim().to_owned();
    let endpoint = format!("{GATEWAY_V4}:{}", value(GATEWAY_CONF, "ListenPort"));
    let (interface, gateway_key) = (&stranger.interface, value(CLIENT_CONF, "PublicKey"));
    stranger.wg(&["set", interface, "private-key", file.to_str().unwrap()]);
    stranger.wg(&["set", interface, "peer", gateway_key, "endpoint", &endpoint]);
    stranger.wg(&["set", interface, "peer", gateway_key, "persistent-keepalive", "1"]);
    lab.client.run("ip", &["link", "set", interface, "up"]).unwrap();
    lab::wait_for("a failure", LIMIT, || {
        Ok((gateway.number("peer_source/failed") >= 1).then_some(()))
    })
    .unwrap();
    let said = gateway.process.errors();
    assert!(said.contains("a peer could not be looked up"), "{said}");
    assert_answered(&lab.client);
    assert_eq!(gateway.peers().len(), 1);

    // The source comes up: the next knock is answered.
    let known = json!({ "public_key": public_key, "allowed_ips": ["10.9.0.77/32"] });
    let _service = Service::start(path, &[known]);
    lab::wait_for("the stranger", LIMIT * 2, || Ok((stranger.peers()[0][4] != "0").then_some(())))
        .unwrap();
    assert_eq!(gateway.peers().len(), 2);
    assert_answered(&lab.client);
}
