//! The programs' log lines on their way to `tracing`.

use std::os::fd::{AsFd, BorrowedFd};

use aya::Ebpf;
use aya_log::EbpfLogger;

use super::BpfError;

/// Reads the programs' log lines. Its descriptor is readable when there are any: wait for that (for
/// instance with tokio's `AsyncFd`), then [`LogReader::flush`].
pub struct LogReader(EbpfLogger<ToTracing>);

impl LogReader {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        EbpfLogger::init_with_logger(ebpf, ToTracing)
            .map(Self)
            .map_err(|error| BpfError::Map { name: "AYA_LOGS", cause: error.to_string() })
    }

    /// Hands all lines that are there to `tracing`, with target `wg_ebpf`.
    pub fn flush(&mut self) {
        self.0.flush();
    }
}

impl AsFd for LogReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args();
        match record.level() {
            log::Level::Error => tracing::error!(target: "wg_ebpf", "{text}"),
            log::Level::Warn => tracing::warn!(target: "wg_ebpf", "{text}"),
            log::Level::Info => tracing::info!(target: "wg_ebpf", "{text}"),
            log::Level::Debug => tracing::debug!(target: "wg_ebpf", "{text}"),
            log::Level::Trace => tracing::trace!(target: "wg_ebpf", "{text}"),
        }
    }

    fn flush(&self) {}
}
