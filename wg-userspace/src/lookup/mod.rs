//! Asks a service on this host for peers: HTTP/1.1 over a Unix socket.
//!
//! The service listens on a stream socket in the file system. Every request comes on a connection of
//! its own, which either side may close after the answer; up to 16 look-ups and 4 timestamps are
//! under way at once. What takes longer than 5 seconds, waiting for a connection included, has failed.
//! A key in a path is the peer's public key in base64 as RFC 4648 §5 has it: URL-safe, 43 characters,
//! without padding. Requests have `Host: localhost`.
//!
//! # Look-up
//!
//! ```text
//! GET /v1/peers/<key> HTTP/1.1
//!
//! 200  {"public_key": "<base64>",             the key that was asked for
//!       "preshared_key": "<base64>",          optional
//!       "allowed_ips": ["10.9.0.2/32", …],    required, may be empty
//!       "endpoint": "192.0.2.1:51820",        optional: an address and a port, no name
//!       "persistent_keepalive": 25,           optional: seconds, 0 is off
//!       "greatest_timestamp": "<hex>"}        optional
//! 404  nobody knows the peer: not asked again for 30 seconds
//! ```
//!
//! A 200 has a body of JSON, at most 64 KiB of it; its content type is not looked at, and other
//! members are ignored. `null` is as good as absence. Keys in it are base64 as wg(8) writes it: the
//! usual alphabet, 44 characters. An address without a length is one host. Every other status and
//! every other body is a failure: the peer is looked up again when it knocks again, a second later at
//! the earliest.
//!
//! A peer is asked for only after it has proved that it has the private key, and stays known for some
//! minutes after its last keypair died. With a `persistent_keepalive` it stays for good. If its
//! prefixes belong to configured peers, it is refused as if it were unknown.
//!
//! # Timestamps
//!
//! ```text
//! PUT /v1/peers/<key>/timestamp HTTP/1.1
//! Content-Type: text/plain
//!
//! 400000006553f10b00000000
//!
//! 2xx  kept
//! ```
//!
//! The body is the greatest timestamp of the peer's initiations: the 12 bytes of a TAI64N label in 24
//! digits of lower-case hex. The service keeps the greatest one it was told (the greatest text is the
//! latest moment), and gives it as `greatest_timestamp`: then nobody who recorded an initiation can
//! have it answered after the peer was forgotten here. A service that cannot keep it answers as it
//! likes.
//!
//! Secrets are wiped here after use; what passes through the HTTP library's buffers is not.

mod answer;
mod exchange;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::rc::Rc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hyper::{Method, StatusCode};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};

use self::exchange::exchange;
use crate::device::{KnownPeer, Lookup, PeerSource, Tai64N};
use crate::key::PublicKey;

pub use answer::AnswerError;

/// Connections for look-ups at once.
const LOOKUP_CONNECTION_COUNT: usize = 16;
/// Connections for timestamps at once: few, and not those of look-ups.
const TIMESTAMP_CONNECTION_COUNT: usize = 4;
/// Time that a request may take with all that belongs to it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Reports that wait to be read; then those who have more to report wait.
const REPORT_COUNT_MAX: usize = 64;

/// Why a request to the service failed.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// There is no connection to be had.
    #[error("connecting to the service: {0}")]
    Connect(std::io::Error),
    /// The exchange broke off, or is no HTTP.
    #[error("talking HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// It took too long.
    #[error("no answer within {} seconds", REQUEST_TIMEOUT.as_secs())]
    Timeout,
    /// An answer with a status that says nothing about the peer.
    #[error("the answer's status is {0}")]
    Status(StatusCode),
    /// The body is larger than any peer is.
    #[error("the answer is longer than {} KiB", exchange::BODY_LEN_MAX >> 10)]
    TooLong,
    /// The body is no description of the peer.
    #[error("the answer is no peer: {0}")]
    Answer(#[from] AnswerError),
}

/// What became of a request.
#[derive(Debug)]
pub enum Report {
    /// Of a look-up.
    LookedUp {
        /// Who was looked up.
        public_key: PublicKey,
        /// The peer, if the service knows it.
        outcome: Result<Option<Box<KnownPeer>>, LookupError>,
    },
    /// Of a timestamp that was to be kept.
    Kept {
        /// Whose it is.
        public_key: PublicKey,
        /// Which.
        timestamp: Tai64N,
        /// Whether it was.
        outcome: Result<(), LookupError>,
    },
}

/// A service that knows peers. Its methods begin requests as tasks of the current `LocalSet`.
#[derive(Clone)]
pub struct HttpSource(Rc<Inner>);

/// Makes connections to the service.
type Connect = Box<dyn Fn() -> std::io::Result<OwnedFd>>;

struct Inner {
    connect: Connect,
    lookups: Semaphore,
    timestamps: Semaphore,
    reports: mpsc::Sender<Report>,
}

impl HttpSource {
    /// The service to which `connect` makes connections, and where its answers come out. Nothing is
    /// opened yet: the service may come and go.
    pub fn new(
        connect: impl Fn() -> std::io::Result<OwnedFd> + 'static,
    ) -> (Self, mpsc::Receiver<Report>) {
        let (reports, receiver) = mpsc::channel(REPORT_COUNT_MAX);
        let inner = Inner {
            connect: Box::new(connect),
            lookups: Semaphore::new(LOOKUP_CONNECTION_COUNT),
            timestamps: Semaphore::new(TIMESTAMP_CONNECTION_COUNT),
            reports,
        };
        (Self(Rc::new(inner)), receiver)
    }
}

impl PeerSource for HttpSource {
    type Peer = KnownPeer;

    fn lookup(&self, public_key: &PublicKey) -> Lookup<KnownPeer> {
        let (inner, public_key) = (Rc::clone(&self.0), *public_key);
        tokio::task::spawn_local(async move {
            let outcome = inner.look_up(&public_key).await;
            // Nobody reads reports when the daemon is about to end.
            let _ = inner.reports.send(Report::LookedUp { public_key, outcome }).await;
        });
        Lookup::Pending
    }

    fn keep_timestamp(&self, public_key: &PublicKey, timestamp: Tai64N) -> bool {
        let (inner, public_key) = (Rc::clone(&self.0), *public_key);
        tokio::task::spawn_local(async move {
            let outcome = inner.put(&public_key, timestamp).await;
            let _ = inner.reports.send(Report::Kept { public_key, timestamp, outcome }).await;
        });
        true
    }
}

impl Inner {
    fn connect(&self) -> Result<UnixStream, LookupError> {
        (self.connect)()
            .and_then(|fd| {
                let stream = StdStream::from(fd);
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream)
            })
            .map_err(LookupError::Connect)
    }

    async fn look_up(&self, key: &PublicKey) -> Result<Option<Box<KnownPeer>>, LookupError> {
        let request = async {
            let _permit = self.lookups.acquire().await;
            exchange(self.connect()?, Method::GET, &peer_path(key), String::new()).await
        };
        let (status, body) = in_time(request).await?;
        match status {
            StatusCode::OK => Ok(Some(Box::new(answer::parse(key, &body)?))),
            StatusCode::NOT_FOUND => Ok(None),
            other => Err(LookupError::Status(other)),
        }
    }

    async fn put(&self, key: &PublicKey, timestamp: Tai64N) -> Result<(), LookupError> {
        let path = format!("{}/timestamp", peer_path(key));
        let request = async {
            let _permit = self.timestamps.acquire().await;
            exchange(self.connect()?, Method::PUT, &path, answer::to_hex(timestamp)).await
        };
        match in_time(request).await?.0 {
            status if status.is_success() => Ok(()),
            other => Err(LookupError::Status(other)),
        }
    }
}

async fn in_time<T>(
    request: impl Future<Output = Result<T, LookupError>>,
) -> Result<T, LookupError> {
    tokio::time::timeout(REQUEST_TIMEOUT, request).await.unwrap_or(Err(LookupError::Timeout))
}

fn peer_path(key: &PublicKey) -> String {
    format!("/v1/peers/{}", BASE64_URL_SAFE_NO_PAD.encode(key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    use super::*;

    const KEY: PublicKey = PublicKey::from_bytes([0xfb; 32]);

    /// Answers each connection with the next of `answers`; gives the requests.
    fn serve(
        path: &Path,
        answers: Vec<Vec<u8>>,
    ) -> std::thread::JoinHandle<std::io::Result<Vec<String>>> {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let mut requests = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept()?;
                let mut request = [0; 4096];
                let mut len = 0;
                // A request is whole with its last byte: the blank line, or a timestamp's digit.
                while !request[..len].ends_with(b"\r\n\r\n") && !request[..len].ends_with(b"0b") {
                    match stream.read(&mut request[len..])? {
                        0 => break,
                        more => len += more,
                    }
                }
                requests.push(String::from_utf8_lossy(&request[..len]).into_owned());
                // Who has read enough may be gone.
                let _ = stream.write_all(&answer);
            }
            Ok(requests)
        })
    }

    fn run<T>(path: &Path, act: impl AsyncFnOnce(HttpSource, mpsc::Receiver<Report>) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let path = path.to_owned();
            let (source, reports) =
                HttpSource::new(move || StdStream::connect(&path).map(OwnedFd::from));
            act(source, reports).await
        })
    }

    fn look_up(path: &Path, times: usize) -> Vec<Result<Option<Box<KnownPeer>>, LookupError>> {
        run(path, async |source, mut reports| {
            let mut outcomes = Vec::new();
            for _ in 0..times {
                assert_eq!(source.lookup(&KEY), Lookup::Pending);
                match reports.recv().await.unwrap() {
                    Report::LookedUp { public_key, outcome } => {
                        assert_eq!(public_key, KEY);
                        outcomes.push(outcome);
                    }
                    other => panic!("{other:?}"),
                }
            }
            outcomes
        })
    }

    fn with_body(status: &str, body: &str) -> Vec<u8> {
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    #[test]
    fn a_known_peer_is_read_and_an_unknown_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("source");
        let body = format!("{{\"public_key\": \"{KEY}\", \"allowed_ips\": [\"10.9.0.2/32\"]}}");
        let chunked = format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
            body.len()
        );
        // As HTTP/1.0 had it: the body ends with the connection.
        let closed = format!("HTTP/1.0 200 OK\r\n\r\n{body}");
        let answers = vec![
            with_body("200 OK", &body),
            chunked.into(),
            closed.into(),
            with_body("404 Not Found", ""),
        ];
        let server = serve(&path, answers);
        let outcomes = look_up(&path, 4);
        let net = "10.9.0.2/32".parse().unwrap();
        for known in &outcomes[..3] {
            let known = known.as_ref().unwrap().as_ref().unwrap();
            assert_eq!((known.public_key, known.allowed_ips.as_slice()), (KEY, &[net][..]));
        }
        assert!(matches!(outcomes[3], Ok(None)));
        let requests = server.join().unwrap().unwrap();
        // The key is URL-safe and has no padding.
        let line = "GET /v1/peers/-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_s HTTP/1.1\r\n";
        assert!(requests[0].starts_with(line), "{}", requests[0]);
        assert!(requests[0].to_ascii_lowercase().contains("\r\nhost: localhost\r\n"));
    }

    #[test]
    fn anything_else_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("source");
        let other =
            format!("{{\"public_key\": \"{}\", \"allowed_ips\": []}}", "A".repeat(43) + "=");
        let long = format!("{{\"x\": \"{}\"}}", "x".repeat(exchange::BODY_LEN_MAX));
        let answers = vec![
            with_body("500 Oh", ""),
            with_body("204 Nothing", ""),
            with_body("301 Moved", ""),
            with_body("200 OK", "{}"),
            with_body("200 OK", &other),
            with_body("200 OK", &long),
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"public".to_vec(),
            b"SSH-2.0-OpenSSH\r\n".to_vec(),
            Vec::new(),
            [b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &[b'x'; 100_000]].concat(),
        ];
        let count = answers.len();
        let server = serve(&path, answers);
        let outcomes = look_up(&path, count);
        for outcome in &outcomes {
            assert!(outcome.is_err(), "{outcome:?}");
        }
        assert!(matches!(outcomes[5], Err(LookupError::TooLong)), "{:?}", outcomes[5]);
        server.join().unwrap().unwrap();
    }

    #[test]
    fn a_service_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let outcomes = look_up(&folder.path().join("nothing"), 1);
        assert!(matches!(outcomes[0], Err(LookupError::Connect { .. })));
    }

    #[test]
    fn a_timestamp_is_put_in_hex() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("source");
        let server = serve(&path, vec![with_body("204 Kept", ""), with_body("405 No", "")]);
        let timestamp = [0x40, 0, 0, 0, 0x65, 0x53, 0xf1, 0xab, 0, 0, 0, 0x0b];
        run(&path, async |source, mut reports| {
            for is_kept in [true, false] {
                assert!(source.keep_timestamp(&KEY, timestamp));
                match reports.recv().await.unwrap() {
                    Report::Kept { public_key, timestamp: kept, outcome } => {
                        assert_eq!((public_key, kept), (KEY, timestamp));
                        assert_eq!(outcome.is_ok(), is_kept);
                    }
                    other => panic!("{other:?}"),
                }
            }
        });
        let requests = server.join().unwrap().unwrap();
        let line = "PUT /v1/peers/-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_v7-_s/timestamp HTTP/1.1";
        assert!(requests[0].starts_with(line), "{}", requests[0]);
        assert!(requests[0].ends_with("\r\n\r\n400000006553f1ab0000000b"), "{}", requests[0]);
    }

    #[test]
    fn connections_are_few() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("source");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        run(&path, async |source, _reports| {
            for _ in 0..100 {
                let _ = source.lookup(&KEY);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        });
        let connections = std::iter::from_fn(|| listener.accept().ok()).count();
        assert_eq!(connections, LOOKUP_CONNECTION_COUNT);
    }
}
