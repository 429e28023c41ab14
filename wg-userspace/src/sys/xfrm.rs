//! Whether IPsec has a say in what this host sends.

use std::io;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

/// Length of `struct nlmsghdr`, and of the flags behind it in the messages here.
const HEADER_LEN: usize = 16;
const FLAGS_LEN: usize = 4;

/// How many policies the calling thread's network namespace has for packets that leave.
///
/// # Errors
/// `PermissionDenied` without `CAP_NET_ADMIN`; `InvalidData` if the kernel's answer is none.
pub fn outbound_policy_count() -> io::Result<u32> {
    const XFRM_MSG_GETSPDINFO: u16 = 0x25;
    const REQUEST_LEN: usize = HEADER_LEN + FLAGS_LEN;

    let kind = SocketType::RAW;
    let socket = match socket_with(
        AddressFamily::NETLINK,
        kind,
        SocketFlags::CLOEXEC,
        Some(netlink::XFRM),
    ) {
        // A kernel without IPsec.
        Err(rustix::io::Errno::PROTONOSUPPORT) => return Ok(0),
        other => other?,
    };
    let mut request = [0; REQUEST_LEN];
    // Length, type, flags, sequence, port; then no flags. All in host byte order.
    request[..4].copy_from_slice(&(REQUEST_LEN as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&XFRM_MSG_GETSPDINFO.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 512];
    let (_, len) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    read_policy_count(answer.get(..len).unwrap_or_default())
}

fn read_policy_count(answer: &[u8]) -> io::Result<u32> {
    const NLMSG_ERROR: u16 = 2;
    const XFRM_MSG_NEWSPDINFO: u16 = 0x24;
    const XFRMA_SPD_INFO: u16 = 1;
    /// In `struct xfrmu_spdinfo`, behind the count of those for packets that come.
    const OUT_AT: usize = 4;

    let u32_at = |bytes: &[u8], at: usize| {
        bytes.get(at..).and_then(<[u8]>::first_chunk).map(|four| u32::from_ne_bytes(*four))
    };
    let u16_at = |bytes: &[u8], at: usize| {
        bytes.get(at..).and_then(<[u8]>::first_chunk).map(|two| u16::from_ne_bytes(*two))
    };
    match u16_at(answer, 4) {
        Some(NLMSG_ERROR) => {
            let code = u32_at(answer, HEADER_LEN).map_or(libc::EIO, |code| -code.cast_signed());
            return Err(io::Error::from_raw_os_error(code));
        }
        Some(XFRM_MSG_NEWSPDINFO) => {}
        _ => return Err(io::ErrorKind::InvalidData.into()),
    }
    let mut rest = answer.get(HEADER_LEN + FLAGS_LEN..).unwrap_or_default();
    while let (Some(len), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let len = usize::from(len).max(4);
        if kind == XFRMA_SPD_INFO {
            let info = rest.get(4..len).unwrap_or_default();
            return u32_at(info, OUT_AT).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Err(io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::require_root;
    use crate::sys::netns::in_new_netns;

    #[test]
    fn policies_are_counted() {
        require_root!();
        in_new_netns(|| {
            assert_eq!(outbound_policy_count().unwrap(), 0);
            for (direction, count) in [("in", 0), ("out", 1)] {
                let line = format!(
                    "xfrm policy add src 10.0.0.1 dst 10.0.0.2 dir {direction} tmpl proto esp mode transport"
                );
                let done = Command::new("ip").args(line.split(' ')).status().unwrap();
                if !done.success() {
                    eprintln!("SKIPPED policies_are_counted: a kernel without IPsec");
                    return;
                }
                assert_eq!(outbound_policy_count().unwrap(), count);
            }
        });
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        let info = |len: u16, kind: u16, bytes: &[u8]| {
            let header = [&[0_u8; 4][..], &0x24_u16.to_ne_bytes(), &[0; 14]].concat();
            [&header[..], &len.to_ne_bytes(), &kind.to_ne_bytes(), bytes].concat()
        };
        assert_eq!(read_policy_count(&info(12, 1, &[1, 0, 0, 0, 2, 0, 0, 0])).unwrap(), 2);
        for bad in
            [&[][..], &[0; 20], &info(12, 1, &[0; 4]), &info(0, 2, &[0; 8]), &info(60, 1, &[0; 8])]
        {
            assert!(read_policy_count(bad).is_err(), "{bad:?}");
        }
        let refused =
            [&[0; 4][..], &2_u16.to_ne_bytes(), &[0; 10], &(-1_i32).to_ne_bytes()].concat();
        assert_eq!(read_policy_count(&refused).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
