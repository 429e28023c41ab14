//! Floods by an AF_XDP socket on the first queue of the interface that was named: without copies where its driver can do
//! that. On a veth, live frames are faster.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use wg_userspace::xsk::{BATCH_MAX, BindMode, Xsk, XskOptions};

use super::arguments::Rate;
use super::pace::Pacer;
use super::sealed::{Places, Plan};
use super::sockets::{DEBT_NS, Flooded, wait};
use super::target::Way;

/// The queue that sends.
const QUEUE: u32 = 0;
/// Nothing is received, but an XSK wants some chunks for it.
const FILL_LEVEL: u32 = 64;
/// How long the last frames may take to leave.
const PATIENCE: Duration = Duration::from_secs(1);

/// Sends the frames of a plan, in order and each of them once, for `limit` at most.
///
/// # Errors
/// If there is no such socket to be had, or the interface does not send.
pub fn flood(
    way: &Way,
    plan: &Plan,
    places: &Places,
    bytes: &[u8],
    rate: Rate,
    limit: Duration,
) -> Result<Flooded> {
    let options = XskOptions {
        mode: BindMode::Auto,
        chunk_size: 4096,
        fill_level: FILL_LEVEL,
        ..XskOptions::default()
    };
    let (mut pool, mut xsk) = Xsk::bind(way.link, QUEUE, options)
        .with_context(|| format!("binding an AF_XDP socket to queue {QUEUE} of {}", way.nic))?;
    let mut done = Flooded::default();
    let begin = Instant::now();
    let mut pacer = rate.number().map(|rate| Pacer::new(rate, 0, DEBT_NS, 1));
    let mut next = 0;
    let mut moved = begin;
    while next < plan.packet_count() {
        let now = begin.elapsed();
        if now >= limit {
            break;
        }
        let mut count = (plan.packet_count() - next).min(BATCH_MAX as u64);
        if let Some(pacer) = &mut pacer {
            count = count.min(pacer.due(next, now.as_nanos() as u64));
            if count == 0 {
                wait(Duration::from_nanos(pacer.when(next, 1)).min(limit).saturating_sub(now));
                continue;
            }
        }
        xsk.complete(&mut pool);
        let first = next;
        while next < first + count {
            let Some(mut frame) = xsk.allocate_to_send(&mut pool) else { break };
            let place = places.at(next);
            frame.truncate(place.len());
            let room = pool.umem().bytes_mut(&mut frame);
            room.copy_from_slice(&bytes[place.offset()..][..place.len()]);
            if let Err(frame) = xsk.transmit(&mut pool, frame) {
                pool.recycle(frame);
                break;
            }
            next += 1;
        }
        xsk.kick().with_context(|| format!("sending by {}", way.nic))?;
        if next > first {
            moved = Instant::now();
        }
        ensure!(moved.elapsed() < PATIENCE, "{} has stopped to send", way.nic);
    }
    done.time = begin.elapsed();
    let end = Instant::now();
    while xsk.sending() > 0 && end.elapsed() < PATIENCE {
        xsk.kick().with_context(|| format!("sending by {}", way.nic))?;
        xsk.complete(&mut pool);
    }
    done.attempted = next;
    done.refused = xsk.sending() as u64;
    done.packets = next - done.refused;
    done.forgiven = pacer.map_or(0, |pacer| pacer.forgiven());
    Ok(done)
}
