//! An AEAD that writes down what it seals and opens, so that the model sees every nonce and every
//! plaintext, and no engine can hide one.

use std::cell::RefCell;

use wg_common::protocol::TAG_LEN;
use wg_userspace::aead::{AeadKey, BatchAead, Job, RingAead};

/// `ring`, with a record for each thread.
pub struct RecordingAead;

/// The one of all simulated devices.
pub static AEAD: RecordingAead = RecordingAead;

thread_local! {
    static RECORD: RefCell<Vec<Operation>> = const { RefCell::new(Vec::new()) };
}

/// A key's name: the same for whoever seals with it and whoever opens with it.
pub type KeyName = u64;

/// What became of a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    Sealed,
    Opened,
    /// The tag was wrong.
    Refused,
}

/// One job of the AEAD.
#[derive(Clone, Debug)]
pub struct Operation {
    pub key: KeyName,
    pub counter: u64,
    pub outcome: Outcome,
    /// What was sealed, or came out; empty if the tag was wrong.
    pub plain: Vec<u8>,
    /// The tag that was made, or came.
    pub tag: [u8; TAG_LEN],
    /// Where the buffer stood: tells which datagram of a batch it was.
    pub address: usize,
}

/// What was done on this thread since the last call.
pub fn take() -> Vec<Operation> {
    RECORD.take()
}

impl BatchAead for RecordingAead {
    fn name(&self) -> &'static str {
        "recording"
    }

    fn seal(&self, jobs: &mut [Job<'_>]) {
        let mut operations = before(jobs);
        for (job, operation) in jobs.iter().zip(&mut operations) {
            operation.plain = job.buffer[..job.buffer.len() - TAG_LEN].to_vec();
        }
        RingAead.seal(jobs);
        for (job, operation) in jobs.iter().zip(&mut operations) {
            operation.outcome = Outcome::Sealed;
            operation.tag = tag(job.buffer);
        }
        RECORD.with_borrow_mut(|record| record.extend(operations));
    }

    fn open(&self, jobs: &mut [Job<'_>]) {
        let mut operations = before(jobs);
        RingAead.open(jobs);
        for (job, operation) in jobs.iter().zip(&mut operations) {
            if job.ok {
                operation.outcome = Outcome::Opened;
                operation.plain = job.buffer[..job.buffer.len() - TAG_LEN].to_vec();
            }
        }
        RECORD.with_borrow_mut(|record| record.extend(operations));
    }
}

fn before(jobs: &[Job<'_>]) -> Vec<Operation> {
    jobs.iter()
        .map(|job| Operation {
            key: name_of(job.key),
            counter: job.counter,
            outcome: Outcome::Refused,
            plain: Vec::new(),
            tag: tag(job.buffer),
            address: job.buffer.as_ptr().addr(),
        })
        .collect()
}

fn tag(buffer: &[u8]) -> [u8; TAG_LEN] {
    buffer.last_chunk().copied().unwrap_or_default()
}

/// The tag of nothing, under a counter that no keypair may ever use.
fn name_of(key: &AeadKey) -> KeyName {
    let mut tag = [0; TAG_LEN];
    RingAead.seal(&mut [Job::new(key, u64::MAX, &mut tag)]);
    u64::from_le_bytes(*tag.first_chunk().expect("a tag is longer"))
}
