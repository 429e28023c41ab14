//! AF_XDP sockets: UMEM, frames, rings.
