//! Which ports may stand for inner ones: not those of which the host itself makes use.
//!
//! They are lent in blocks, so that two devices with one external address do not give the same port to two
//! flows: a block is one device's.

use wg_common::nat::map::PORTS_LEN;

/// Ports of a block.
pub const BLOCK_LEN: u32 = 4096;
/// Blocks that there are.
pub const BLOCK_COUNT: u32 = (1 << 16) / BLOCK_LEN;
/// The first port that needs no privilege: those before it are well known.
const FIRST: usize = 1024;
/// A block with fewer free ports is none.
const LEAST: usize = 256;

const _: () = assert!(PORTS_LEN.is_multiple_of(BLOCK_LEN));

/// The ports that are free.
#[derive(Clone)]
pub struct FreePorts {
    is_free: Box<[bool; 1 << 16]>,
}

impl Default for FreePorts {
    /// All that need no privilege.
    fn default() -> Self {
        let mut is_free = Box::new([true; 1 << 16]);
        is_free[..FIRST].fill(false);
        Self { is_free }
    }
}

impl FreePorts {
    /// Takes a port away.
    pub fn take(&mut self, port: u16) {
        self.is_free[usize::from(port)] = false;
    }

    /// Takes away what `net.ipv4.ip_local_port_range` names: the first and the last port that sockets get by
    /// themselves. Text that says something else takes nothing away.
    pub fn take_ephemeral(&mut self, text: &str) {
        let mut words = text.split_ascii_whitespace().map(str::parse::<u16>);
        if let (Some(Ok(first)), Some(Ok(last))) = (words.next(), words.next()) {
            self.take_range(first, last);
        }
    }

    /// Takes away what `net.ipv4.ip_local_reserved_ports` names: `8080,9000-9010`.
    pub fn take_reserved(&mut self, text: &str) {
        for item in text.trim().split(',') {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            if let (Ok(first), Ok(last)) = (first.trim().parse(), last.trim().parse()) {
                self.take_range(first, last);
            }
        }
    }

    /// Takes away the local ports of sockets that `/proc/net/tcp`, `udp` and their like list.
    pub fn take_sockets(&mut self, text: &str) {
        for line in text.lines() {
            let local = line.split_ascii_whitespace().nth(1);
            let port = local.and_then(|local| local.rsplit_once(':')).map(|(_, port)| port);
            // Its heading has no such word.
            if let Some(Ok(port)) = port.map(|port| u16::from_str_radix(port, 16)) {
                self.take(port);
            }
        }
    }

    fn take_range(&mut self, first: u16, last: u16) {
        if first <= last {
            self.is_free[usize::from(first)..=usize::from(last)].fill(false);
        }
    }

    /// Whether a port is free.
    pub fn is_free(&self, port: u16) -> bool {
        self.is_free[usize::from(port)]
    }

    /// The free ports of a block, ascending; none if they are too few to be of use.
    pub fn of_block(&self, block: u32) -> Vec<u16> {
        let ports = (block * BLOCK_LEN)..((block + 1) * BLOCK_LEN).min(1 << 16);
        let ports = ports.filter_map(|port| u16::try_from(port).ok());
        let free: Vec<u16> = ports.filter(|port| self.is_free(*port)).collect();
        if free.len() < LEAST { Vec::new() } else { free }
    }

    /// Where the [`PORTS_LEN`] ports begin among which most are free, and their blocks, those with the most
    /// free ports first. Nothing if there is no block.
    pub fn window(&self) -> Option<Window> {
        let counts: Vec<usize> = (0..BLOCK_COUNT).map(|block| self.of_block(block).len()).collect();
        let blocks_len = (PORTS_LEN / BLOCK_LEN) as usize;
        let firsts = 0..=(counts.len() - blocks_len);
        let free = |first: usize| counts[first..first + blocks_len].iter().sum::<usize>();
        // The first one of those that are as good.
        let first = firsts.rev().max_by_key(|&first| free(first))?;
        let mut blocks: Vec<u32> = (first..first + blocks_len).map(|block| block as u32).collect();
        blocks.retain(|&block| counts[block as usize] > 0);
        blocks.sort_by_key(|&block| std::cmp::Reverse(counts[block as usize]));
        (!blocks.is_empty()).then_some(Window { port_first: first as u32 * BLOCK_LEN, blocks })
    }
}

/// Ports for a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Window {
    /// The first of [`PORTS_LEN`].
    pub port_first: u32,
    /// The blocks among them that may be asked for.
    pub blocks: Vec<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_the_host_are_not_free() {
        let mut ports = FreePorts::default();
        ports.take_ephemeral("32768\t60999\n");
        ports.take_reserved("8080, 9000-9002,,x,9-\n");
        ports.take_sockets(
            "  sl  local_address rem_address   st tx_queue\n   \
             0: 0100007F:1F91 00000000:0000 0A 00000000:00000000\n   \
             1: 00000000000000000000000000000000:CA6C 00000000000000000000000000000000:0000 07 0\n",
        );
        for port in [0, 1, 1023, 8080, 8081, 9000, 9002, 0xca6c, 32768, 60999] {
            assert!(!ports.is_free(port), "{port}");
        }
        for port in [1024, 8079, 8082, 8999, 9003, 32767, 61000, 65535] {
            assert!(ports.is_free(port), "{port}");
        }
        for nonsense in ["", "1", "x y", "5 1", "70000 80000"] {
            let mut ports = FreePorts::default();
            ports.take_ephemeral(nonsense);
            ports.take_reserved(nonsense);
            ports.take_sockets(nonsense);
            assert_eq!(ports.is_free.iter().filter(|is| **is).count(), (1 << 16) - FIRST);
        }
    }

    #[test]
    fn the_window_is_where_the_host_is_not() {
        let window = |range: &str| {
            let mut ports = FreePorts::default();
            ports.take_ephemeral(range);
            ports.window()
        };
        let usual = window("32768 60999").unwrap();
        assert_eq!((usual.port_first, usual.blocks.len()), (0, 8));
        assert_eq!(usual.blocks.last(), Some(&0), "it lacks those below 1024");
        let high = window("10000 32767").unwrap();
        assert_eq!((high.port_first, high.blocks.len()), (32768, 8));
        assert_eq!(window("1024 65535"), None);
        let little = window("1024 65000").unwrap();
        assert_eq!((little.port_first, &little.blocks[..]), (32768, &[15][..]));
    }

    #[test]
    fn a_block_has_its_free_ports_or_none() {
        let mut ports = FreePorts::default();
        assert_eq!(ports.of_block(0), (1024..4096).collect::<Vec<u16>>());
        assert_eq!(ports.of_block(15).last(), Some(&u16::MAX));
        ports.take_ephemeral("4096 8000");
        assert!(ports.of_block(1).is_empty());
    }
}
