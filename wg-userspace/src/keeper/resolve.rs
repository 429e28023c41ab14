//! Looks up names of endpoints for the data process, which may open no sockets.
//!
//! The host's own resolver does it, with its `/etc/hosts` and its name servers, and that may take its time:
//! it has a thread of its own, which begins with the first name. Names wait for it in a bounded queue, each
//! once, and none is looked up more often than every [`RESOLVE_EVERY`], whatever the data process asks for.
//! Who comes too often, or when the queue is full, is not answered.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::mpsc;
use wg_common::time::Now;

use super::protocol::{RESOLVE_EVERY, RESOLVED_MAX, Request};

/// Names that wait.
const WAITING_MAX: usize = 256;
/// Names of which it is known when they were looked up. If all were so just now, others have to wait.
const KNOWN_MAX: usize = 4096;

/// What is looked up.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Question {
    /// For which device.
    pub device: u16,
    /// The name.
    pub host: String,
    /// The port that goes with each address.
    pub port: u16,
}

impl Question {
    /// What a request asks for, if that is where a name leads.
    pub fn of(request: &Request) -> Option<Self> {
        match request {
            Request::Resolve { device, host, port } => {
                Some(Self { device: *device, host: host.clone(), port: *port })
            }
            _ => None,
        }
    }
}

/// Where a name leads.
#[derive(Debug)]
pub struct Resolved {
    /// What was asked.
    pub question: Question,
    /// None if nobody knows.
    pub addresses: Vec<SocketAddr>,
}

/// How names are looked up.
type LookUp = fn(&Question) -> io::Result<Vec<SocketAddr>>;

/// Looks up names, one after the other.
pub struct Resolver {
    look_up: LookUp,
    answers: mpsc::Sender<Resolved>,
    /// To the thread, once there is one.
    questions: Option<SyncSender<Question>>,
    known: HashMap<Question, Known>,
}

struct Known {
    asked: Now,
    is_waiting: bool,
}

impl Resolver {
    /// One that gives its answers to the receiver; [`Resolver::answered`] is to be told of each.
    pub fn new() -> (Self, mpsc::Receiver<Resolved>) {
        Self::with(look_up)
    }

    fn with(look_up: LookUp) -> (Self, mpsc::Receiver<Resolved>) {
        let (answers, receiver) = mpsc::channel(1);
        (Self { look_up, answers, questions: None, known: HashMap::new() }, receiver)
    }

    /// Has a name looked up; says whether it will be, if it does not wait already.
    pub fn ask(&mut self, question: Question, now: Now) -> bool {
        let is_recent = |known: &Known| known.is_waiting || now.since(known.asked) < RESOLVE_EVERY;
        if self.known.get(&question).is_some_and(is_recent) {
            return false;
        }
        if self.known.len() >= KNOWN_MAX {
            self.known.retain(|_, known| is_recent(known));
            if self.known.len() >= KNOWN_MAX {
                return false;
            }
        }
        if self.questions.is_none() {
            match self.start() {
                Ok(questions) => self.questions = Some(questions),
                Err(error) => tracing::warn!(%error, "names of endpoints are not looked up"),
            }
        }
        let Some(questions) = &self.questions else { return false };
        if questions.try_send(question.clone()).is_err() {
            return false;
        }
        self.known.insert(question, Known { asked: now, is_waiting: true });
        true
    }

    /// Takes note of an answer.
    pub fn answered(&mut self, question: &Question) {
        if let Some(known) = self.known.get_mut(question) {
            known.is_waiting = false;
        }
    }

    fn start(&self) -> io::Result<SyncSender<Question>> {
        let (questions, asked) = sync_channel::<Question>(WAITING_MAX);
        let (look_up, answers) = (self.look_up, self.answers.clone());
        let answer = move || {
            for question in asked {
                let addresses = look_up(&question).unwrap_or_else(|error| {
                    tracing::debug!(host = question.host.as_str(), %error, "a name leads nowhere");
                    Vec::new()
                });
                if answers.blocking_send(Resolved { question, addresses }).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("resolver".to_owned()).spawn(answer)?;
        Ok(questions)
    }
}

fn look_up(question: &Question) -> io::Result<Vec<SocketAddr>> {
    let addresses = (question.host.as_str(), question.port).to_socket_addrs()?;
    Ok(addresses.take(RESOLVED_MAX).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;

    const START: Now = Now::from_boot_ns(1_000_000_000_000);

    fn question(host: &str) -> Question {
        Question { device: 0, host: host.to_owned(), port: 7 }
    }

    #[test]
    fn a_name_is_looked_up_and_not_again_at_once() {
        let (mut resolver, mut answers) = Resolver::new();
        let here = question("127.0.0.1");
        assert!(resolver.ask(here.clone(), START));
        assert!(!resolver.ask(here.clone(), START + RESOLVE_EVERY), "it waits");
        let answer = answers.blocking_recv().unwrap();
        assert_eq!(answer.addresses, ["127.0.0.1:7".parse().unwrap()]);
        resolver.answered(&answer.question);
        let almost = RESOLVE_EVERY - Duration::from_nanos(1);
        assert!(!resolver.ask(here.clone(), START + almost));
        assert!(resolver.ask(here, START + RESOLVE_EVERY));
    }

    #[test]
    fn a_name_that_leads_nowhere_is_answered_too() {
        let nowhere = |_: &Question| Err(io::ErrorKind::NotFound.into());
        let (mut resolver, mut answers) = Resolver::with(nowhere);
        assert!(resolver.ask(question("nowhere.test"), START));
        assert!(answers.blocking_recv().unwrap().addresses.is_empty());
    }

    #[test]
    fn who_asks_for_too_much_waits_for_nothing() {
        static BLOCKED: Mutex<()> = Mutex::new(());
        let slow = |_: &Question| {
            drop(BLOCKED.lock());
            Ok(Vec::new())
        };
        let blocked = BLOCKED.lock().unwrap();
        let (mut resolver, mut answers) = Resolver::with(slow);
        let taken = (0..2 * KNOWN_MAX).filter(|n| resolver.ask(question(&n.to_string()), START));
        let taken = taken.count();
        assert!((WAITING_MAX..=WAITING_MAX + 1).contains(&taken), "{taken}");
        drop(blocked);
        for _ in 0..taken {
            resolver.answered(&answers.blocking_recv().unwrap().question);
        }
        assert!(resolver.ask(question("later"), START), "when there is room again");
    }

    #[test]
    fn what_is_known_of_names_is_bounded() {
        let (mut resolver, mut answers) = Resolver::with(|_| Ok(Vec::new()));
        for number in 0..KNOWN_MAX {
            assert!(resolver.ask(question(&number.to_string()), START));
            resolver.answered(&answers.blocking_recv().unwrap().question);
        }
        assert!(!resolver.ask(question("one more"), START));
        assert!(resolver.ask(question("one more"), START + RESOLVE_EVERY));
        assert_eq!(resolver.known.len(), 1);
    }
}
