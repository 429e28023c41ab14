//! The maps and globals of the load generator's programs: the ABI between them and `tidegate-load`.
//!
//! They are no part of the gateway, and are built into an object of their own.

/// XDP program that puts the next packet into a live frame.
pub const LIVE_PROGRAM: &str = "tidegate_load_live";
/// TC program that counts packets and drops them.
pub const COUNT_PROGRAM: &str = "tidegate_load_count";

/// Array of bytes, mapped: whole frames, none of which crosses the end of a chunk of [`CHUNK_LEN`].
pub const CHUNKS: &str = "CHUNKS";
/// Bytes of an entry of [`CHUNKS`].
pub const CHUNK_LEN: usize = 1 << 16;
/// Bytes of a frame at most; within a chunk, a frame begins where there is room for as many.
pub const FRAME_LEN_MAX: usize = 2048;
/// Bytes of a frame at least: Ethernet's header.
pub const FRAME_LEN_MIN: usize = 14;

/// Array of `u64`, mapped: where each frame stands, as [`frame_entry`] has it.
pub const FRAMES: &str = "FRAMES";

/// Array with one entry of [`STATE_LEN`] words, mapped: how far the frames have been sent.
pub const STATE: &str = "STATE";
/// Words of [`STATE`].
pub const STATE_LEN: usize = 16;
/// The frame to send next.
pub const STATE_NEXT: usize = 0;
/// The one behind the last.
pub const STATE_END: usize = 1;
/// Time between two frames, in parts of a nanosecond ([`INTERVAL_PARTS_LOG2`]); 0: as soon as possible.
pub const STATE_INTERVAL: usize = 2;
/// Time after the first call from which no more frames are sent, in ns.
pub const STATE_LIMIT_NS: usize = 3;
/// When the first call was, in ns of the monotonic clock; 0: there was none.
pub const STATE_FIRST_NS: usize = 4;
/// When frame 0 was due, by the same clock: with the first call, and later where the sender was too late to make up
/// for it.
pub const STATE_BEGIN_NS: usize = 5;
/// When the last frame was sent.
pub const STATE_LAST_NS: usize = 6;
/// Calls for which no frame was due.
pub const STATE_IDLE: usize = 7;
/// Calls that failed.
pub const STATE_FAILED: usize = 8;

/// 1,024 parts make a nanosecond.
pub const INTERVAL_PARTS_LOG2: u32 = 10;
/// What a late sender makes up for, in ns.
pub const DEBT_NS: u64 = 5_000_000;
/// How often a call looks whether its frame is due by now.
pub const LOOKS: u32 = 64;

/// `u32`: index of the interface by which frames leave.
pub const NIC_GLOBAL: &str = "NIC";
/// `u32`: bytes before the IP header of what is counted.
pub const LINK_LEN_GLOBAL: &str = "LINK_LEN";
/// `u16`: the UDP port of what is counted, in host byte order.
pub const PORT_GLOBAL: &str = "PORT";

/// Per-CPU array with one entry of [`COUNTS_LEN`] words.
pub const COUNTS: &str = "COUNTS";
/// Words of [`COUNTS`].
pub const COUNTS_LEN: usize = 6;
/// Packets.
pub const COUNTS_PACKETS: usize = 0;
/// Their bytes, from the IP header on.
pub const COUNTS_BYTES: usize = 1;
/// Buffers that they came in.
pub const COUNTS_BUFFERS: usize = 2;
/// When the first came, in ns of the monotonic clock, coarsely; 0: none has.
pub const COUNTS_FIRST_NS: usize = 3;
/// When the last came.
pub const COUNTS_LAST_NS: usize = 4;
/// Packets that passed.
pub const COUNTS_PASSED: usize = 5;

/// Per-CPU array of `u64`: packets of so many bytes. The last entry has all that are longer, too.
pub const SIZES: &str = "SIZES";
/// Entries of [`SIZES`].
pub const SIZES_LEN: u32 = 2048;

/// An entry of [`FRAMES`], for `len` bytes at `offset` of all chunks.
pub const fn frame_entry(offset: usize, len: usize) -> u64 {
    let (chunk, at) = (offset / CHUNK_LEN, offset % CHUNK_LEN);
    (chunk as u64) << 32 | (at as u64) << 16 | len as u64
}

/// Chunk, offset in it and length of a [`frame_entry`].
#[inline(always)]
pub const fn frame_of_entry(entry: u64) -> (u32, u64, u64) {
    ((entry >> 32) as u32, entry >> 16 & 0xffff, entry & 0xffff)
}

/// The least offset from `offset` on at which a frame may begin: a multiple of 8, with room for the longest before
/// the end of its chunk.
pub const fn frame_offset(offset: usize) -> usize {
    let offset = offset.next_multiple_of(8);
    if offset % CHUNK_LEN > CHUNK_LEN - FRAME_LEN_MAX {
        offset.next_multiple_of(CHUNK_LEN)
    } else {
        offset
    }
}

/// Packets in a buffer of the kernel's with `payload_len` bytes behind its headers, of which each has
/// `segment_len` and the last may have fewer: how many, and bytes of the last. 0 is a segment length of what is one
/// packet.
#[inline(always)]
pub const fn segments(payload_len: u32, segment_len: u32) -> (u32, u32) {
    if segment_len == 0 || payload_len <= segment_len {
        return (1, payload_len);
    }
    let whole = (payload_len - 1) / segment_len;
    (whole + 1, payload_len - whole * segment_len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_where_frames_stand() {
        let offset = 7 * CHUNK_LEN + 4096;
        assert_eq!(frame_of_entry(frame_entry(offset, 138)), (7, 4096, 138));
        assert_eq!(frame_of_entry(frame_entry(0, FRAME_LEN_MAX)), (0, 0, 2048));
    }

    #[test]
    fn no_frame_crosses_the_end_of_a_chunk() {
        let mut offset = 0;
        for len in (FRAME_LEN_MIN..=FRAME_LEN_MAX).cycle().take(5000) {
            let at = frame_offset(offset);
            assert!(at >= offset && at.is_multiple_of(8));
            assert!(at % CHUNK_LEN + FRAME_LEN_MAX <= CHUNK_LEN);
            offset = at + len;
        }
    }

    #[test]
    fn segments_make_up_their_buffer() {
        assert_eq!(segments(36, 0), (1, 36));
        assert_eq!(segments(36, 36), (1, 36));
        assert_eq!(segments(37, 36), (2, 1));
        assert_eq!(segments(72, 36), (2, 36));
        assert_eq!(segments(0, 36), (1, 0));
        for payload_len in 1..200 {
            for segment_len in 1..50 {
                let (count, last) = segments(payload_len, segment_len);
                assert_eq!((count - 1) * segment_len + last, payload_len);
                assert!((1..=segment_len).contains(&last));
            }
        }
    }
}
