//! Plain TCP through the tunnel: a file each way with its sha256, and a stream for a few seconds.
//!
//! `serve` runs on the LAN host and takes one connection after the other; the other commands run
//! on the client and print one JSON object. What arrived is always counted by who received it.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How long a connection may stand still: longer than a lost handshake takes to be repeated.
const PATIENCE: Duration = Duration::from_secs(20);
const CHUNK_LEN: usize = 128 << 10;
/// Of a stream that is held back.
const PACED_CHUNK_LEN: usize = 16 << 10;

/// Sends and receives files and load over TCP.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Tool,
}

#[derive(Subcommand)]
enum Tool {
    /// Serves the other commands until it is ended.
    Serve {
        /// TCP port, on all addresses.
        port: u16,
        /// Where received files go.
        directory: PathBuf,
    },
    /// Sends a file; the server says what it received.
    Put {
        /// Address and port of the server.
        server: SocketAddr,
        /// The file to send.
        file: PathBuf,
    },
    /// Fetches a file by its path on the server.
    Get {
        /// Address and port of the server.
        server: SocketAddr,
        /// The server's file.
        remote: PathBuf,
        /// Where to put it.
        file: PathBuf,
    },
    /// Streams for a while.
    Load {
        /// Address and port of the server.
        server: SocketAddr,
        /// Which way the stream goes, seen from here.
        direction: Direction,
        /// For how long, in milliseconds.
        duration_ms: u64,
        /// Payload of the stream, at most; without, as much as will go.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        mbit_s: Option<u32>,
    },
}

/// Which way a stream goes, seen from the client.
#[derive(Clone, Copy, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Up,
    Down,
}

/// The first line of a connection: what the client wants.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Put { name: PathBuf },
    Get { file: PathBuf },
    Load { direction: Direction, duration_ms: u64, mbit_s: Option<u32> },
}

/// What the receiver of a stream saw.
#[derive(Deserialize, Serialize)]
struct Received {
    bytes: u64,
    /// From the first byte to the last.
    seconds: f64,
    mbit_s: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    /// Where it came from, if the server received it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<IpAddr>,
}

impl Received {
    fn new(bytes: u64, taken: Duration, sha256: Option<String>) -> Received {
        let seconds = taken.as_secs_f64().max(1e-6);
        Received { bytes, seconds, mbit_s: bytes as f64 * 8e-6 / seconds, sha256, from: None }
    }
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Tool::Serve { port, directory } => serve(port, &directory),
        Tool::Put { server, file } => print(&put(server, &file)?),
        Tool::Get { server, remote, file } => print(&get(server, remote, &file)?),
        Tool::Load { server, direction, duration_ms, mbit_s } => {
            print(&load(server, direction, duration_ms, mbit_s)?)
        }
    }
}

fn print(received: &Received) -> Result<()> {
    println!("{}", serde_json::to_string(received)?);
    Ok(())
}

fn serve(port: u16, directory: &Path) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("{{\"event\":\"ready\"}}");
    for stream in listener.incoming() {
        let (stream, directory) = (stream?, directory.to_owned());
        thread::spawn(move || {
            if let Err(error) = answer(stream, &directory) {
                eprintln!("lab-tool: {error:#}");
            }
        });
    }
    Ok(())
}

fn answer(stream: TcpStream, directory: &Path) -> Result<()> {
    patient(&stream)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut received = match serde_json::from_str(&line)? {
        Request::Put { name } => receive_file(&mut reader, &directory.join(name))?,
        Request::Get { file } => return send_file(&stream, &file),
        Request::Load { direction: Direction::Up, .. } => sink(&mut reader)?,
        Request::Load { direction: Direction::Down, duration_ms, mbit_s } => {
            return stream_for(&stream, duration_ms, mbit_s);
        }
    };
    // The socket takes both families, and shows IPv4 as a part of IPv6.
    received.from = Some(stream.peer_addr()?.ip().to_canonical());
    (&stream).write_all(&serde_json::to_vec(&received)?)?;
    Ok(())
}

fn ask(server: SocketAddr, request: &Request) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE)
        .with_context(|| format!("connecting to {server}"))?;
    patient(&stream)?;
    (&stream).write_all(format!("{}\n", serde_json::to_string(request)?).as_bytes())?;
    Ok(stream)
}

fn patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn put(server: SocketAddr, file: &Path) -> Result<Received> {
    let name = file.file_name().context("a file has a name")?;
    let stream = ask(server, &Request::Put { name: name.into() })?;
    send_file(&stream, file)?;
    verdict(stream)
}

fn get(server: SocketAddr, remote: PathBuf, file: &Path) -> Result<Received> {
    receive_file(&mut ask(server, &Request::Get { file: remote })?, file)
}

fn load(
    server: SocketAddr,
    direction: Direction,
    duration_ms: u64,
    mbit_s: Option<u32>,
) -> Result<Received> {
    let mut stream = ask(server, &Request::Load { direction, duration_ms, mbit_s })?;
    match direction {
        Direction::Up => {
            stream_for(&stream, duration_ms, mbit_s)?;
            verdict(stream)
        }
        Direction::Down => sink(&mut stream),
    }
}

/// What the server says it received.
fn verdict(mut stream: TcpStream) -> Result<Received> {
    let mut text = String::new();
    stream.read_to_string(&mut text).context("waiting for what the server received")?;
    ensure!(!text.is_empty(), "the server ended the connection without an answer");
    Ok(serde_json::from_str(&text)?)
}

fn send_file(stream: &TcpStream, file: &Path) -> Result<()> {
    let mut from = File::open(file).with_context(|| format!("reading {}", file.display()))?;
    let sent = io::copy(&mut from, &mut &*stream).context("sending the file")?;
    stream.shutdown(Shutdown::Write)?;
    if sent == 0 {
        bail!("{} is empty", file.display());
    }
    Ok(())
}

fn receive_file(from: &mut impl Read, file: &Path) -> Result<Received> {
    let mut to = File::create(file).with_context(|| format!("writing {}", file.display()))?;
    let mut hash = Sha256::new();
    let (bytes, taken) = receive(from, |chunk| {
        hash.update(chunk);
        to.write_all(chunk)
    })?;
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Received::new(bytes, taken, Some(sha256)))
}

fn sink(from: &mut impl Read) -> Result<Received> {
    let (bytes, taken) = receive(from, |_| Ok(()))?;
    Ok(Received::new(bytes, taken, None))
}

/// Reads to the end; the time runs from the first byte.
fn receive(
    from: &mut impl Read,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(u64, Duration)> {
    let mut chunk = vec![0; CHUNK_LEN];
    let (mut bytes, mut started, mut last) = (0, None, Instant::now());
    loop {
        let len = from.read(&mut chunk).context("receiving")?;
        if len == 0 {
            return Ok((bytes, started.map_or(Duration::ZERO, |started| last - started)));
        }
        last = Instant::now();
        started.get_or_insert(last);
        bytes += len as u64;
        take(&chunk[..len])?;
    }
}

fn stream_for(stream: &TcpStream, duration_ms: u64, mbit_s: Option<u32>) -> Result<()> {
    // Large ones would make bursts of what is to be a stream.
    let chunk = vec![0x5a; if mbit_s.is_some() { PACED_CHUNK_LEN } else { CHUNK_LEN }];
    let begun = Instant::now();
    let end = begun + Duration::from_millis(duration_ms);
    let mut sent = 0u64;
    while Instant::now() < end {
        (&*stream).write_all(&chunk).context("sending load")?;
        sent += chunk.len() as u64;
        if let Some(mbit_s) = mbit_s {
            let due = begun + Duration::from_secs_f64(sent as f64 * 8e-6 / f64::from(mbit_s));
            thread::sleep(due.min(end).saturating_duration_since(Instant::now()));
        }
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paced_stream_carries_no_more_than_it_was_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let served = thread::spawn(move || {
            for _ in 0..2 {
                let (stream, _) = listener.accept().unwrap();
                answer(stream, Path::new("/nowhere")).unwrap();
            }
        });
        for direction in [Direction::Up, Direction::Down] {
            let received = load(server, direction, 200, Some(8)).unwrap();
            // 200 ms of a million bytes a second, and the chunk that is on its way at the end.
            let most = 200_000 + PACED_CHUNK_LEN as u64;
            assert!((1..=most).contains(&received.bytes), "{}", received.bytes);
        }
        served.join().unwrap();
    }
}
