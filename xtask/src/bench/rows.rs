//! What is measured: the measurements, and the rows of the report that each of them fills.

use std::time::Duration;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// A line of the report.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Row {
    /// What samples are filed under.
    pub id: String,
    /// What it says.
    pub title: String,
    /// Of its numbers.
    pub unit: String,
    /// Which numbers are the better ones.
    pub better: Better,
    /// Decimals that are shown.
    pub decimals: usize,
    /// The plot in which it is drawn.
    pub plot: Plot,
}

/// Which numbers are the better ones.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Large ones.
    Higher,
    /// Small ones.
    Lower,
}

/// A plot of the report.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Plot {
    /// TCP through the gateway.
    Throughput,
    /// CPU for each gigabyte.
    CpuPerByte,
    /// Packets of floods.
    Packets,
    /// CPU for each packet.
    CpuPerPacket,
    /// Echoes.
    Latency,
    /// Handshakes.
    Handshakes,
}

impl Plot {
    /// All of them, in the order of the report.
    pub const ALL: [Plot; 6] = [
        Plot::Throughput,
        Plot::CpuPerByte,
        Plot::Packets,
        Plot::CpuPerPacket,
        Plot::Latency,
        Plot::Handshakes,
    ];

    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Plot::Throughput => "TCP through the gateway",
            Plot::CpuPerByte => "CPU of the gateway host for each gigabyte",
            Plot::Packets => "Packets delivered under a flood",
            Plot::CpuPerPacket => "CPU of the gateway host for each packet delivered",
            Plot::Latency => "Echo through the gateway",
            Plot::Handshakes => "Handshakes answered",
        }
    }
}

/// Which way a stream goes, seen from the client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// To the LAN host.
    Up,
    /// From the LAN host.
    Down,
}

impl Way {
    /// The word that `lab-tool` knows it by.
    pub fn word(self) -> &'static str {
        match self {
            Way::Up => "up",
            Way::Down => "down",
        }
    }
}

/// The inner packets of a flood.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Size {
    /// All of this length in bytes.
    Bytes(u16),
    /// The internet's mix.
    Imix,
}

impl Size {
    /// The word that `tidegate-load` knows it by.
    pub fn word(self) -> String {
        match self {
            Size::Bytes(bytes) => bytes.to_string(),
            Size::Imix => "imix".to_owned(),
        }
    }
}

/// Something that is done to a gateway and fills rows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Measurement {
    /// TCP between client and LAN host.
    Tcp(Way, u8),
    /// Echoes of UDP, with or without 100 Mbit/s of TCP beside them.
    Echo {
        /// Whether there is TCP beside them.
        loaded: bool,
    },
    /// As many datagrams as come, from a peer that has sealed them before.
    Flood(Size),
    /// As many initiations as are answered.
    Handshakes,
}

use Measurement::{Echo, Flood, Handshakes, Tcp};

/// TCP beside echoes under load.
pub const ECHO_LOAD_MBIT_S: u32 = 100;

impl Measurement {
    /// All of them, in the order in which they are made.
    pub const ALL: [Measurement; 11] = [
        Tcp(Way::Up, 1),
        Tcp(Way::Down, 1),
        Tcp(Way::Up, 4),
        Tcp(Way::Down, 4),
        Echo { loaded: false },
        Echo { loaded: true },
        Flood(Size::Bytes(64)),
        Flood(Size::Bytes(512)),
        Flood(Size::Bytes(1372)),
        Flood(Size::Imix),
        Handshakes,
    ];

    /// The word on the command line.
    pub fn name(self) -> String {
        match self {
            Tcp(way, streams) => format!("tcp-{}-{streams}", way.word()),
            Echo { loaded: false } => "echo-idle".to_owned(),
            Echo { loaded: true } => "echo-load".to_owned(),
            Flood(size) => format!("flood-{}", size.word()),
            Handshakes => "handshakes".to_owned(),
        }
    }

    /// Those that are named, in the order of [`Measurement::ALL`]; all if none is. `tcp` stands for all
    /// that begin with it, and so do the others.
    ///
    /// # Errors
    /// If there is none of a name: the text says which there are.
    pub fn named(names: &[String]) -> Result<Vec<Measurement>> {
        let is_meant = |measurement: &Measurement, name: &str| {
            let all = measurement.name();
            all == name || all.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'))
        };
        for name in names {
            if !Measurement::ALL.iter().any(|measurement| is_meant(measurement, name)) {
                let all = Measurement::ALL.map(Measurement::name).join(", ");
                bail!("no row is called `{name}`; there are {all}");
            }
        }
        let all = Measurement::ALL.into_iter();
        Ok(all
            .filter(|measurement| {
                names.is_empty() || names.iter().any(|name| is_meant(measurement, name))
            })
            .collect())
    }

    /// How long it is made, beside what must be begun and ended.
    pub fn duration(self, lengths: &Lengths) -> Duration {
        let ms = match self {
            Tcp(..) => lengths.tcp_ms,
            Echo { .. } => lengths.echo_ms,
            Flood(_) => lengths.flood_ms,
            Handshakes => lengths.handshakes_ms,
        };
        Duration::from_millis(ms)
    }

    /// The rows that it fills.
    pub fn rows(self) -> Vec<Row> {
        use Better::{Higher, Lower};
        let row = |id: String, title: String, unit: &str, better, decimals, plot| Row {
            id,
            title,
            unit: unit.to_owned(),
            better,
            decimals,
            plot,
        };
        match self {
            Tcp(way, streams) => {
                let (way, many) = (way.word(), if streams == 1 { "stream" } else { "streams" });
                let what = format!("{way}, {streams} {many}");
                let (id, plot) = (self.id(), Plot::CpuPerByte);
                vec![
                    row(id.clone(), format!("TCP {what}"), "Gbit/s", Higher, 2, Plot::Throughput),
                    row(format!("{id}_core"), format!("core, TCP {what}"), "s/GB", Lower, 2, plot),
                    row(
                        format!("{id}_process"),
                        format!("process, TCP {what}"),
                        "s/GB",
                        Lower,
                        2,
                        plot,
                    ),
                ]
            }
            Echo { loaded } => {
                let when = match loaded {
                    false => "idle".to_owned(),
                    true => format!("under {ECHO_LOAD_MBIT_S} Mbit/s"),
                };
                let percentile = |p: &str| {
                    let (id, title) = (format!("{}_{p}", self.id()), format!("echo {when}, {p}"));
                    row(id, title, "µs", Lower, 0, Plot::Latency)
                };
                vec![percentile("p50"), percentile("p99")]
            }
            Flood(size) => {
                let what = match size {
                    Size::Bytes(bytes) => format!("{bytes} bytes"),
                    Size::Imix => "IMIX".to_owned(),
                };
                let (id, plot) = (self.id(), Plot::CpuPerPacket);
                vec![
                    row(id.clone(), format!("flood, {what}"), "kpps", Higher, 0, Plot::Packets),
                    row(format!("{id}_core"), format!("core, flood, {what}"), "µs", Lower, 2, plot),
                    row(
                        format!("{id}_process"),
                        format!("process, flood, {what}"),
                        "µs",
                        Lower,
                        2,
                        plot,
                    ),
                ]
            }
            Handshakes => {
                let (id, plot) = (self.id(), Plot::Handshakes);
                vec![
                    row(id.clone(), "handshakes".to_owned(), "1/s", Higher, 0, plot),
                    row(format!("{id}_core"), "core, handshake".to_owned(), "µs", Lower, 1, plot),
                ]
            }
        }
    }

    /// What its first row's samples are filed under.
    pub fn id(self) -> String {
        self.name().replace('-', "_")
    }
}

/// How long measurements are made, in milliseconds.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Lengths {
    /// A TCP load.
    pub tcp_ms: u64,
    /// Echoes.
    pub echo_ms: u64,
    /// A flood.
    pub flood_ms: u64,
    /// A storm of handshakes.
    pub handshakes_ms: u64,
}

impl Lengths {
    /// What is used unless something else is asked for.
    pub const FULL: Lengths =
        Lengths { tcp_ms: 2500, echo_ms: 2000, flood_ms: 1500, handshakes_ms: 2000 };
    /// With `--quick`.
    pub const QUICK: Lengths =
        Lengths { tcp_ms: 1000, echo_ms: 1000, flood_ms: 600, handshakes_ms: 800 };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn named(names: &[&str]) -> Result<Vec<String>> {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        Ok(Measurement::named(&names)?.into_iter().map(Measurement::name).collect())
    }

    #[test]
    fn rows_are_named_alone_or_by_what_they_begin_with() {
        assert_eq!(named(&["tcp-up-4"]).unwrap(), ["tcp-up-4"]);
        assert_eq!(named(&["tcp-down"]).unwrap(), ["tcp-down-1", "tcp-down-4"]);
        assert_eq!(
            named(&["handshakes", "echo"]).unwrap(),
            ["echo-idle", "echo-load", "handshakes"]
        );
        assert_eq!(named(&[]).unwrap().len(), Measurement::ALL.len());
        // The beginning of a word is none of its own.
        let error = named(&["flood", "tc"]).unwrap_err().to_string();
        assert!(error.starts_with("no row is called `tc`; there are tcp-up-1, "), "{error}");
    }

    #[test]
    fn no_two_rows_have_one_id() {
        let rows: Vec<_> = Measurement::ALL.into_iter().flat_map(Measurement::rows).collect();
        let ids: BTreeSet<_> = rows.iter().map(|row| &row.id).collect();
        assert_eq!(ids.len(), rows.len());
        for measurement in Measurement::ALL {
            assert!(measurement.rows()[0].id.starts_with(&measurement.id()), "{measurement:?}");
        }
    }
}
