//! `up`: from a config file to an interface that works, or to none at all.

use std::{io, path::Path, time::Duration};

use anyhow::Context;
use ipnet::IpNet;
use rustix::io::Errno;
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

use super::{
    Code, Failure, args,
    down::runtime,
    launch::Background,
    name::{ConfigFile, InterfaceName},
    plan::{Plan, tunnel_mtu},
    print, resolve, show,
    socket::Socket,
    text::plural,
};
use crate::{
    config::{self, ConfigErrors},
    daemon::Mode,
    host::{Host, missing_routes},
    sys::clock,
    uapi,
};

pub fn up(arguments: args::Up) -> Result<Code, Failure> {
    let started = clock::boot_now();
    let file = ConfigFile::which(&arguments.what, Path::exists)
        .map_err(|error| Failure::new(Code::Usage, error))?;
    let interface = &file.interface;
    let text = read(&file.path)?;
    let config = config::parse(&file.path.display().to_string(), &text).map_err(Failure::config)?;
    if let Some(errors) = ConfigErrors::new(config.unsupported()) {
        return Err(Failure::config(errors));
    }

    let runtime = runtime()?;
    let host = runtime.block_on(async { Host::new() })?;
    if runtime.block_on(host.link(interface.as_str()))?.is_some() {
        return Err(Failure::new(Code::Existence, "the interface exists already").within(interface));
    }
    let retries = resolve::retries();
    let plan = Plan::new(interface, &config, &arguments.data_path, |host, port| {
        resolve::resolve(host, port, retries)
    })?;

    let background = Background::start(&plan.daemon, None)?;
    let configured = runtime.block_on(async {
        tokio::select! {
            configured = configure(interface, &host, &plan) => configured,
            interrupted = interrupted() => Err(interrupted),
        }
    });
    match configured {
        Ok(mtu) => summarize(interface, &plan, mtu, clock::boot_now().since(started)),
        Err(failure) => {
            let rolled_back = runtime.block_on(roll_back(interface, &host));
            background.stop();
            let failure = failure.within(interface);
            Err(match rolled_back {
                Ok(()) => failure.and("the interface was taken down again"),
                Err(error) => failure.and(format_args!("its daemon was stopped ({error})")),
            })
        }
    }
}

/// Reads a config file; warns if everybody else can, too.
fn read(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let doing = || format!("reading {}", path.display());
    let text = match std::fs::read_to_string(path) {
        Ok(text) => Zeroizing::new(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let line = format_args!("there is no {}", path.display());
            return Err(Failure::new(Code::Existence, line));
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            let line = format_args!("{} is not UTF-8 text", path.display());
            return Err(Failure::new(Code::Config, line));
        }
        Err(error) => return Err(anyhow::Error::new(error).context(doing()).into()),
    };
    if is_world_accessible(path).with_context(doing)? {
        let path = path.display();
        eprintln!(
            "tidegate: warning: everybody may read {path} and the keys in it: `chmod 600 {path}`"
        );
    }
    Ok(text)
}

/// Whether others have any right to the file and to its folder, as wg-quick asks.
fn is_world_accessible(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    const OTHERS: u32 = 0o007;
    let path = path.canonicalize()?;
    let file = path.metadata()?.permissions().mode();
    let folder = match path.parent() {
        Some(folder) => folder.metadata()?.permissions().mode(),
        None => OTHERS,
    };
    Ok(file & folder & OTHERS != 0)
}

/// Tells the daemon and the kernel what the plan says; gives the MTU.
async fn configure(interface: &InterfaceName, host: &Host, plan: &Plan) -> Result<u32, Failure> {
    let index = host.link_index(interface.as_str()).await?;
    tell_daemon(interface, plan)?;
    for &address in &plan.addresses {
        host.add_address(index, address).await?;
    }
    let mtu = match plan.mtu {
        Some(mtu) => mtu,
        None => {
            let mut paths = Vec::new();
            for endpoint in &plan.endpoints {
                paths.extend(host.path_mtu(endpoint.ip()).await?);
            }
            tunnel_mtu(&paths, host.default_route_mtu().await?)
        }
    };
    host.set_mtu(index, mtu).await?;
    host.set_up(index).await?;
    let present = host.routes(index).await?;
    for route in missing_routes(plan.allowed_ips.iter().copied(), present) {
        host.add_route(index, route).await?;
    }
    Ok(mtu)
}

fn tell_daemon(interface: &InterfaceName, plan: &Plan) -> Result<(), Failure> {
    let socket = Socket::find(interface)?
        .ok_or_else(|| Failure::new(Code::Runtime, "the daemon does not listen any more"))?;
    match socket.request(&uapi::format_set(&plan.request))?.error() {
        None => Ok(()),
        Some(error) if Errno::from_io_error(&error) == Some(Errno::ADDRINUSE) => {
            let line = "the port is in use by another program: choose another ListenPort";
            Err(Failure::new(Code::Runtime, line))
        }
        Some(error) => {
            Err(anyhow::Error::new(error).context("the daemon refused the configuration").into())
        }
    }
}

/// Waits for a signal that means to end.
async fn interrupted() -> Failure {
    let signals = signal(SignalKind::interrupt())
        .and_then(|interrupt| Ok((interrupt, signal(SignalKind::terminate())?)))
        .context("waiting for signals");
    match signals {
        Ok((mut interrupt, mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            Failure::new(Code::Runtime, "interrupted")
        }
        Err(error) => error.into(),
    }
}

/// Deletes the interface; with it go its addresses and routes, and its daemon ends.
async fn roll_back(interface: &InterfaceName, host: &Host) -> anyhow::Result<()> {
    let index = host.link_index(interface.as_str()).await?;
    Ok(host.delete_link(index).await?)
}

/// Says what came of it.
fn summarize(
    interface: &InterfaceName,
    plan: &Plan,
    mtu: u32,
    took: Duration,
) -> Result<Code, Failure> {
    let socket = Socket::find(interface)?
        .ok_or_else(|| Failure::new(Code::Runtime, "the daemon ended").within(interface))?;
    let state = show::ask(interface, &socket, false)?;
    let mut facts = vec![plural(plan.peer_count as u64, "peer")];
    facts.extend(plan.addresses.iter().map(IpNet::to_string));
    facts.push(format!("port {}", state.listen_port));
    facts.push(format!("MTU {mtu}"));
    let margin = " ".repeat(interface.as_str().len());
    let mut text = format!("{interface}  up in {} ms   {}\n", took.as_millis(), facts.join(" · "));
    let mut code = Code::Ok;
    if let Some(path) = &state.data_path {
        text += &format!("{margin}  {path}\n");
        if plan.daemon.mode == Mode::Native && path.mode != "native" {
            text += &format!("{margin}  degraded: --mode native was asked for\n");
            code = Code::Degraded;
        }
    }
    print(&text)?;
    Ok(code)
}
