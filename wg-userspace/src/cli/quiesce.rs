//! `quiesce`: no keys in memory, for a snapshot of this machine.

use serde::Deserialize;

use super::{Code, Failure, args::Quiesce, show::not_found, socket::Socket, text::plural};

/// What a daemon answers.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answered {
    /// Workers that stood still, and may be in the midst of sealing.
    stuck_workers: u64,
}

pub fn quiesce(arguments: &Quiesce) -> Result<Code, Failure> {
    let interface = &arguments.interface;
    let socket = Socket::find(interface)?.ok_or_else(|| not_found(interface))?;
    let request = match arguments.seconds {
        _ if arguments.resume => "tidegate=resume\n".to_owned(),
        Some(seconds) => format!("tidegate=quiesce\nseconds={seconds}\n"),
        None => "tidegate=quiesce\n".to_owned(),
    };
    let answer = socket.request(&request)?;
    if let Some(error) = answer.error() {
        let line = format_args!(
            "its daemon does not do that: {error}; start it with this version of Tidegate"
        );
        return Err(Failure::new(Code::Runtime, line).within(interface));
    }
    let text: String = answer.lines().collect();
    let answered: Answered = match text.as_str() {
        "" => Answered::default(),
        text => serde_json::from_str(text).map_err(|_| {
            let line = "its daemon gave no answer that makes sense; start it with this version of \
                        Tidegate";
            Failure::new(Code::Runtime, line).within(interface)
        })?,
    };
    if answered.stuck_workers > 0 {
        let do_not = if answered.stuck_workers == 1 { "does not" } else { "do not" };
        let workers = plural(answered.stuck_workers, "worker");
        let line = format_args!(
            "quiesced, but {workers} {do_not} move and may yet hold keys; quiesce it again before the \
             snapshot, or take it down"
        );
        return Err(Failure::new(Code::Degraded, line).within(interface));
    }
    Ok(Code::Ok)
}
