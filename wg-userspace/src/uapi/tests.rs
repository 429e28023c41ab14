//! The server against clients of all kinds, the real wg(8) among them.

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use super::memory::Memory;
use super::places::Places;
use super::*;
use crate::device::{Device, SetRequest};
use crate::key::PrivateKey;

/// A device and nothing else.
#[derive(Default)]
struct Bare {
    device: RefCell<Device>,
    request_count: Cell<u32>,
    refuses: Cell<bool>,
    names: RefCell<Vec<EndpointName>>,
    /// The time of the last pause, `None` after it was resumed.
    quiesced: Cell<Option<Option<Duration>>>,
}

impl Handler for Bare {
    fn get_part(&self, cursor: &mut GetCursor) -> Option<Zeroizing<String>> {
        let device = self.device.borrow();
        format_get_part(cursor, &device, device.listen_port(), &|_| PeerStatus {
            endpoint: None,
            is_by_name: false,
            last_handshake: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            rx_bytes: 148,
            tx_bytes: 92,
            worker: None,
        })
    }

    fn set(&self, request: SetRequest) -> Result<(), Errno> {
        self.request_count.set(self.request_count.get() + 1);
        if self.refuses.get() {
            return Err(Errno::EADDRINUSE);
        }
        self.device.borrow_mut().apply(request);
        Ok(())
    }

    fn set_names(&self, names: Vec<EndpointName>) -> Result<(), Errno> {
        self.names.replace(names);
        Ok(())
    }

    fn status(&self) -> serde_json::Value {
        serde_json::json!({ "mode": "native", "lines": "a\nb" })
    }

    async fn quiesce(&self, time: Option<Duration>) -> Result<serde_json::Value, Errno> {
        tokio::task::yield_now().await;
        self.quiesced.set(Some(time));
        Ok(serde_json::json!({ "stuck_workers": 0 }))
    }

    fn resume(&self) -> Result<(), Errno> {
        self.quiesced.set(None);
        Ok(())
    }
}

/// Runs `client` beside a server of `handler` in a directory of its own.
fn with_server<T>(handler: &Rc<Bare>, client: impl AsyncFnOnce(PathBuf) -> T) -> T {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let server = Server::bind_in(dir.path(), "wg0").unwrap();
        let path = server.path().unwrap().to_owned();
        tokio::select! {
            never = server.serve(Rc::clone(handler)) => match never {},
            outcome = client(path) => outcome,
        }
    })
}

/// As the daemon's control thread runs it.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), work).await.unwrap() })
}

async fn ask(path: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[test]
fn names_of_endpoints_replace_those_before() {
    let handler = Rc::new(Bare::default());
    let key = PrivateKey::from_bytes([1; 32]).public_key().to_hex();
    with_server(&handler, async |path| {
        let request = format!("tidegate=names\npublic_key={key}\nhost=server.test\nport=7\n\n");
        assert_eq!(ask(&path, &request).await, "errno=0\n\n");
        assert_eq!(format_names(&*handler.names.borrow()), request.trim_end().to_owned() + "\n");
        let wrong = format!("tidegate=names\npublic_key={key}\nhost=a b\nport=7\n\nget=1\n\n");
        assert_eq!(
            ask(&path, &wrong).await,
            "errno=-22\n\nlisten_port=0\nerrno=0\n\n",
            "to its end"
        );
        assert_eq!(handler.names.borrow().len(), 1);
        assert_eq!(ask(&path, "tidegate=names\npublic_key=").await, "errno=-71\n\n", "cut off");
        assert_eq!(ask(&path, "tidegate=names\n\n").await, "errno=0\n\n");
        assert!(handler.names.borrow().is_empty());
    });
}

#[test]
fn requests_are_answered_one_after_the_other() {
    let handler = Rc::new(Bare::default());
    with_server(&handler, async |path| {
        let requests =
            "set=1\nlisten_port=7\n\nget=1\n\n\ntidegate=status\n\nset=1\nx=1\n\nget=1\n";
        let answer = ask(&path, requests).await;
        let expected = "errno=0\n\nlisten_port=7\nerrno=0\n\n\
             {\"lines\":\"a\\nb\",\"mode\":\"native\"}\nerrno=0\n\nerrno=-22\n\n\
             listen_port=7\nerrno=0\n\n";
        assert_eq!(answer, expected);
    });
}

#[test]
fn a_device_is_quiesced_and_resumed() {
    let handler = Rc::new(Bare::default());
    with_server(&handler, async |path| {
        let done = "{\"stuck_workers\":0}\nerrno=0\n\n";
        assert_eq!(ask(&path, "tidegate=quiesce\n\n").await, done);
        assert_eq!(handler.quiesced.get(), Some(None));
        let then_get = "tidegate=quiesce\nseconds=30\n\nget=1\n\n";
        let answer = ask(&path, then_get).await;
        assert_eq!(answer, format!("{done}listen_port=0\nerrno=0\n\n"));
        assert_eq!(handler.quiesced.get(), Some(Some(Duration::from_secs(30))));
        assert_eq!(ask(&path, "tidegate=resume\n\n").await, "errno=0\n\n");
        assert_eq!(handler.quiesced.get(), None);
        for wrong in ["seconds=0", "seconds=x", "seconds=-1", "second=1", "seconds=99999999999"] {
            let request = format!("tidegate=quiesce\n{wrong}\n\n");
            assert_eq!(ask(&path, &request).await, "errno=-22\n\n", "{wrong}");
        }
        assert_eq!(handler.quiesced.get(), None);
    });
}

#[test]
fn a_request_that_fails_changes_nothing() {
    let handler = Rc::new(Bare::default());
    with_server(&handler, async |path| {
        let set = "set=1\nlisten_port=9\n";
        let long = "x".repeat(100_000);
        for (request, answer) in [
            (format!("{set}fwmark=x\nnonsense\n\n"), "errno=-22\n\n"),
            (format!("{set}nonsense\n\n"), "errno=-71\n\n"),
            (format!("{set}fwmark={long}\n\n"), "errno=-71\n\n"),
            (set.to_owned(), "errno=-71\n\n"),
            (format!("{set}fwm"), "errno=-71\n\n"),
            ("get=1\nx\n\n".to_owned(), "errno=-71\n\n"),
            ("foo=1\n\n".to_owned(), "errno=-71\n\n"),
            (format!("{long}\n\n"), "errno=-71\n\n"),
            ("\n\n".to_owned(), ""),
            ("get".to_owned(), ""),
        ] {
            assert_eq!(ask(&path, &request).await, answer, "{:.60}", request);
        }
        assert_eq!(handler.request_count.get(), 0);
        handler.refuses.set(true);
        assert_eq!(ask(&path, &format!("{set}\n")).await, "errno=-98\n\n");
        assert_eq!(handler.device.borrow().listen_port(), 0);
    });
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    let handler = Rc::new(Bare::default());
    with_server(&handler, async |path| {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(b"set=1\nfwmark=\xff\n\n").await.unwrap();
        let mut answer = [0; 11];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"errno=-71\n\n");
    });
}

#[test]
fn who_is_slow_or_gone_does_not_keep_others_waiting() {
    let handler = Rc::new(Bare::default());
    with_server(&handler, async |path| {
        let mut slow = UnixStream::connect(&path).await.unwrap();
        for byte in b"set=1\nlisten_port=5" {
            slow.write_all(&[*byte]).await.unwrap();
            drop(UnixStream::connect(&path).await.unwrap());
            let mut rude = UnixStream::connect(&path).await.unwrap();
            rude.write_all(b"get=1\n\n").await.unwrap();
            drop(rude);
            assert_eq!(ask(&path, "get=1\n\n").await, "listen_port=0\nerrno=0\n\n");
        }
        slow.write_all(b"1\n\n").await.unwrap();
        let mut answer = [0; 9];
        slow.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"errno=0\n\n");
        assert_eq!(handler.device.borrow().listen_port(), 51);
    });
}

#[test]
fn a_request_may_have_any_number_of_peers() {
    const PEER_COUNT: u32 = 20_000;
    let handler = Rc::new(Bare::default());
    with_server(&handler, async |path| {
        let mut request = String::from("set=1\nreplace_peers=true\n");
        for peer in 0..PEER_COUNT {
            let net = format!("10.{}.{}.{}/32", peer >> 16, peer >> 8 & 0xff, peer & 0xff);
            request += &format!("public_key={peer:064x}\nallowed_ip={net}\n");
        }
        request += "\n";
        assert_eq!(ask(&path, &request).await, "errno=0\n\n");
        assert_eq!(handler.device.borrow().peer_count(), PEER_COUNT as usize);
        let answer = ask(&path, "get=1\n\n").await;
        assert_eq!(answer.matches("allowed_ip=").count(), PEER_COUNT as usize);
        assert!(answer.ends_with("\nerrno=0\n\n"));
    });
}

#[test]
fn the_socket_is_the_owners_and_goes_with_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("wireguard");
    run(async {
        let server = Server::bind_in(&dir, "wg0").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(server.path().unwrap())), (0o700, 0o600));
        let busy = Server::bind_in(&dir, "wg0").unwrap_err();
        assert!(matches!(busy, BindError::Busy(_)), "{busy}");
        Server::bind_in(&dir, "wg1").unwrap();
        let path = server.path().unwrap().to_owned();
        drop(server);
        assert!(!path.exists());
    });
}

#[test]
fn only_a_dead_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wg0.sock");
    run(async {
        drop(StdListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file");
        let server = Server::bind_in(dir.path(), "wg0").unwrap();

        fs::remove_file(&path).unwrap();
        let _other = StdListener::bind(&path).unwrap();
        drop(server);
        assert!(path.exists(), "somebody else's by now");

        fs::write(dir.path().join("wg1.sock"), "").unwrap();
        let in_the_way = Server::bind_in(dir.path(), "wg1").unwrap_err();
        assert!(matches!(in_the_way, BindError::InTheWay(_)), "{in_the_way}");
        for name in ["", "..", "a/b"] {
            let refused = Server::bind_in(dir.path(), name).unwrap_err();
            assert!(matches!(refused, BindError::Name(_)), "{refused}");
        }
    });
}

/// wg(8) removes a socket that refuses it.
#[test]
fn a_socket_has_its_name_only_while_somebody_listens() {
    const COUNT: usize = 300;
    let dir = tempfile::tempdir().unwrap();
    let began = std::time::Instant::now();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            for number in 0..COUNT {
                let path = dir.path().join(format!("wg{number}.sock"));
                while let Err(error) = StdStream::connect(&path) {
                    assert!(began.elapsed() < Duration::from_secs(60), "{error}");
                    assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{}", path.display());
                }
            }
        });
        // What a process that was killed has left is in nobody's way.
        fs::write(dir.path().join(".wg0.new"), "").unwrap();
        let bind = |number| Listener::bind_in(dir.path(), &format!("wg{number}")).unwrap();
        let all: Vec<Listener> = (0..COUNT).map(bind).collect();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), all.len());
        client.join().unwrap();
    });
}

#[test]
fn the_oldest_silent_client_makes_room_for_a_new_one() {
    const STALLED: usize = 64;
    let handler = Rc::new(Bare::default());
    with_server(&handler, async |path| {
        let mut silent = Vec::new();
        for number in 0..STALLED {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            // Some are idle, some stop in the middle of a request.
            let words: &[u8] = if number % 2 == 0 { b"" } else { b"set=1\nlisten_port=1" };
            stream.write_all(words).await.unwrap();
            silent.push(stream);
        }
        for _ in 0..STALLED {
            assert_eq!(ask(&path, "get=1\n\n").await, "listen_port=0\nerrno=0\n\n");
        }
        assert_eq!(silent[0].read(&mut [0]).await.unwrap(), 0, "the first one was let go");
        let last = silent.last_mut().unwrap();
        last.write_all(b"\n\n").await.unwrap();
        let mut answer = [0; 9];
        last.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"errno=0\n\n", "the newest was not");
    });
}

#[test]
fn a_request_that_is_too_large_is_refused_and_keeps_nobody_from_an_ordinary_one() {
    const MIB: usize = 1 << 20;
    let (handler, memory, places) = (Bare::default(), Memory::of(2 * MIB), Places::default());
    let (handler, memory, places) = (&handler, &memory, &places);
    // What follows `set=1`, so many bytes as they are counted.
    let peers = |len: usize| -> String {
        let count = len / size_of::<crate::device::PeerChange>();
        (1..=count).map(|n| format!("public_key={n:064x}\n")).collect()
    };
    /// Sends words on a connection and says what is answered, until it is silent.
    async fn say(stream: &mut UnixStream, words: &str) -> String {
        stream.write_all(words.as_bytes()).await.unwrap();
        let mut answer = vec![0; 100];
        let len = stream.read(&mut answer).await.unwrap();
        String::from_utf8(answer[..len].to_vec()).unwrap()
    }
    run(async {
        let connect = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let place = places.take(tokio::time::Instant::now());
            (ours, client::serve(theirs, handler, memory, place))
        };
        let (mut huge, huge_served) = connect();
        let (mut second, second_served) = connect();
        let talk = async {
            let too_large = format!("set=1\n{}\n", peers(4 * MIB));
            assert_eq!(say(&mut huge, &too_large).await, "errno=-7\n\n");
            let (large, small) = (peers(2 * MIB + MIB / 2), peers(MIB / 2));
            // The first one has not said all yet.
            huge.write_all(format!("set=1\n{large}fwmark").as_bytes()).await.unwrap();
            while memory.lent() < 2 * MIB {
                tokio::task::yield_now().await;
            }
            assert_eq!(say(&mut second, &format!("set=1\n{large}\n")).await, "errno=-12\n\n");
            assert_eq!(say(&mut second, &format!("set=1\n{small}\n")).await, "errno=0\n\n");
            // Its words make no sense in the end.
            assert_eq!(say(&mut huge, "=1\n\n").await, "errno=-22\n\n");
            assert_eq!(memory.lent(), 0);
            assert_eq!(say(&mut second, &format!("set=1\n{large}\n")).await, "errno=0\n\n");
            // Who vanishes in the middle has nothing any more.
            huge.write_all(format!("set=1\n{large}").as_bytes()).await.unwrap();
            drop((huge, second));
        };
        tokio::join!(huge_served, second_served, talk);
        assert_eq!(memory.lent(), 0);
    });
}

#[test]
fn a_huge_request_lets_others_have_their_turn() {
    let handler = Rc::new(Bare::default());
    let turns = Rc::new(Cell::new(0));
    with_server(&handler, async |path| {
        let turns_of_others = async {
            loop {
                turns.set(turns.get() + 1);
                tokio::task::yield_now().await;
            }
        };
        let peers: String = (1..=5000).map(|n| format!("public_key={n:064x}\n")).collect();
        let talk = async {
            assert_eq!(ask(&path, &format!("set=1\n{peers}\n")).await, "errno=0\n\n");
            let after_set = turns.get();
            assert!(after_set > 10, "{after_set}");
            assert!(ask(&path, "get=1\n\n").await.ends_with("errno=0\n\n"));
            assert!(turns.get() > after_set + 10, "{}", turns.get());
        };
        tokio::select! {
            () = turns_of_others => {}
            () = talk => {}
        }
    });
}

#[test]
fn a_server_can_be_built_of_a_socket_that_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wg0.sock");
    run(async {
        let listener = StdListener::bind(&path).unwrap();
        let server = Server::from_fd(listener.into()).unwrap();
        tokio::select! {
            never = server.serve(Rc::new(Bare::default())) => match never {},
            answer = ask(&path, "get=1\n\n") => assert_eq!(answer, "listen_port=0\nerrno=0\n\n"),
        }
        assert!(StdStream::connect(&path).is_err());
        assert!(path.exists(), "its file is another's");
    });
}

/// The real wg(8), which looks for sockets in one directory only.
struct Wg {
    interface: String,
}

impl Wg {
    /// Runs `wg WORDS` with `{}` as the interface and its output as outcome.
    async fn run(&self, words: &str) -> Output {
        let words = words.replace("{}", &self.interface);
        let run = move || Command::new("wg").args(words.split_whitespace()).output().unwrap();
        tokio::task::spawn_blocking(run).await.unwrap()
    }

    async fn accept(&self, words: &str) -> String {
        let output = self.run(words).await;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "wg {words}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    async fn refuse(&self, words: &str) -> String {
        let output = self.run(words).await;
        assert!(!output.status.success(), "wg {words}");
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn the_real_wg_configures_and_shows_a_device() {
    const NAME: &str = "the_real_wg_configures_and_shows_a_device";
    if Command::new("wg").arg("--version").output().is_err() {
        return eprintln!("SKIPPED {NAME}: wg(8) is not installed (package wireguard-tools)");
    }
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED {NAME}: wg(8) looks in {SOCKET_DIR}, which is root's");
    }
    let handler = Rc::new(Bare::default());
    let wg = Wg { interface: format!("tgu{}", std::process::id()) };
    run(async {
        let server = Server::bind(&wg.interface).unwrap();
        tokio::select! {
            never = server.serve(Rc::clone(&handler)) => match never {},
            () = configure_and_show(&wg, &handler) => {}
        }
    });
    let path = Path::new(SOCKET_DIR).join(format!("{}.sock", wg.interface));
    assert!(!path.exists());
}

async fn configure_and_show(wg: &Wg, handler: &Bare) {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let key = |seed: u8| PrivateKey::from_bytes([seed; 32]);
    let private = key(1).to_base64();
    let (own, [a, b]) = (key(1).public_key(), [2, 3].map(|seed| key(seed).public_key()));
    let preshared = "c3NzaHNzaHNzaHNzaHNzaHNzaHNzaHNzaHNzaHNzaCE=";
    let whole = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\nFwMark = 0xca6c\n\n\
         [Peer]\nPublicKey = {a}\nPresharedKey = {preshared}\n\
         AllowedIPs = 10.9.0.2/32, fd09::2/128\nEndpoint = [fd00::1]:51820\n\
         PersistentKeepalive = 25\n\n\
         [Peer]\nPublicKey = {b}\nAllowedIPs = 10.9.0.3/24\nEndpoint = 192.0.2.1:7\n",
        private.as_str()
    );

    // The real wg reads the file, and so do we: both must make the same device.
    wg.accept(&format!("setconf {{}} {}", file("whole.conf", &whole))).await;
    let config = crate::config::parse("whole.conf", &whole).unwrap();
    let mut ours = Device::default();
    ours.apply(SetRequest::replacing(&config, |endpoint| match endpoint {
        crate::config::Endpoint::Address(addr) => Some(*addr),
        crate::config::Endpoint::Host { .. } => None,
    }));
    let text = |device: &Device| format_get(device, 0, &|_| PeerStatus::default());
    assert_eq!(text(&handler.device.borrow()), text(&ours));

    assert!(wg.accept("show interfaces").await.split_whitespace().any(|name| name == wg.interface));
    let dump = wg.accept("show {} dump").await;
    let expected = format!(
        "{}\t{own}\t51820\t0xca6c\n\
         {a}\t{preshared}\t[fd00::1]:51820\t10.9.0.2/32,fd09::2/128\t1700000000\t148\t92\t25\n\
         {b}\t(none)\t192.0.2.1:7\t10.9.0.0/24\t1700000000\t148\t92\toff\n",
        private.as_str()
    );
    assert_eq!(dump, expected);
    let shown = wg.accept("showconf {}").await;
    assert!(shown.contains(&format!("PresharedKey = {preshared}")), "{shown}");
    assert!(crate::config::parse("shown.conf", &shown).is_ok(), "{shown}");

    wg.accept(&format!("set {{}} peer {a} remove")).await;
    wg.accept(&format!("set {{}} fwmark off peer {b} persistent-keepalive 5 allowed-ips ::/0"))
        .await;
    wg.accept(&format!("set {{}} peer {own} allowed-ips 10.0.0.0/8")).await;
    let dump = wg.accept("show {} dump").await;
    let peer = format!("{b}\t(none)\t192.0.2.1:7\t::/0\t1700000000\t148\t92\t5\n");
    assert_eq!(dump, format!("{}\t{own}\t51820\toff\n{peer}", private.as_str()));

    let more = format!("[Peer]\nPublicKey = {a}\nAllowedIPs = 10.1.0.0/16\n");
    wg.accept(&format!("addconf {{}} {}", file("more.conf", &more))).await;
    assert_eq!(wg.accept("show {} peers").await, format!("{b}\n{a}\n"));
    wg.accept(&format!("syncconf {{}} {}", file("whole.conf", &whole))).await;
    assert_eq!(text(&handler.device.borrow()).len(), text(&ours).len());

    handler.refuses.set(true);
    let said = wg.refuse("set {} listen-port 9").await;
    assert!(said.contains("Address already in use"), "{said}");
    handler.refuses.set(false);
    assert_eq!(handler.device.borrow().listen_port(), 51820);

    // Most of what wg sends is longer than what a socket takes at once.
    let mut large = format!("[Interface]\nPrivateKey = {}\n", private.as_str());
    for peer in 0..3000_u32 {
        let mut bytes = [9; 32];
        bytes[..4].copy_from_slice(&peer.to_le_bytes());
        let key = crate::key::PublicKey::from_bytes(bytes);
        let [_, _, high, low] = peer.to_be_bytes();
        large += &format!("[Peer]\nPublicKey = {key}\nAllowedIPs = 10.2.{high}.{low}\n");
    }
    wg.accept(&format!("setconf {{}} {}", file("large.conf", &large))).await;
    assert_eq!(wg.accept("show {} peers").await.lines().count(), 3000);

    // wg sends all of it although the first line is refused already: it must not die of a closed socket.
    handler.refuses.set(true);
    let said =
        wg.refuse(&format!("setconf {{}} {}", dir.path().join("large.conf").display())).await;
    assert!(said.contains("Address already in use"), "{said}");
}
