//! The replay window against a set of all counters that have come.

use std::collections::BTreeSet;

use wg_common::id::Counter;
use wg_common::protocol::{REJECT_AFTER_MESSAGES, REPLAY_WINDOW_LEN};
use wg_userspace::session::ReplayWindow;

use super::Input;

/// The window as the whitepaper has it, without any thought of memory.
#[derive(Default)]
struct Model(BTreeSet<u64>);

impl Model {
    fn accept(&mut self, counter: u64) -> bool {
        let greatest = self.0.last().copied().unwrap_or(0);
        let is_old = greatest >= REPLAY_WINDOW_LEN && counter <= greatest - REPLAY_WINDOW_LEN;
        counter < REJECT_AFTER_MESSAGES && !is_old && self.0.insert(counter)
    }
}

/// Each three bytes are a step from the last counter, on or back.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (window, mut model) = (ReplayWindow::new(), Model::default());
    let mut counter = 0_u64;
    while !input.is_empty() {
        let (kind, step) = (input.byte(), u64::from(input.number()));
        counter = match kind % 8 {
            0 => counter.wrapping_add(step),
            1 => counter.wrapping_sub(step),
            2 => counter.wrapping_add(step << (kind >> 3)),
            3 => counter.wrapping_sub(step << (kind >> 3)),
            4 => (REJECT_AFTER_MESSAGES - 1).wrapping_add(step).wrapping_sub(8),
            5 => model.0.last().map_or(0, |last| last.wrapping_sub(REPLAY_WINDOW_LEN)) ^ step & 1,
            // Runs fill words.
            6 => {
                for _ in 0..step % 200 {
                    check(&window, &mut model, counter);
                    counter = counter.wrapping_add(1);
                }
                counter
            }
            _ => step,
        };
        check(&window, &mut model, counter);
    }
}

fn check(window: &ReplayWindow, model: &mut Model, counter: u64) {
    let expected = model.accept(counter);
    assert_eq!(window.would_accept(Counter(counter)), expected, "{counter}");
    assert_eq!(window.accept(Counter(counter)), expected, "{counter}");
    assert!(!window.accept(Counter(counter)), "twice");
}

/// Steps on and back, runs, jumps to the edges.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![
        [6, 199, 0].repeat(45),
        [0, 1, 0, 1, 2, 0, 0, 0, 32, 1, 255, 31, 5, 0, 0, 5, 1, 0].to_vec(),
        [2 | 40 << 3, 1, 0, 6, 100, 0, 4, 0, 0, 4, 7, 0, 4, 8, 0, 1, 0, 32].to_vec(),
        [6, 64, 0, 3 | 3 << 3, 4, 0, 0, 63, 0, 0, 64, 0, 0, 65, 0].to_vec(),
    ]
}
