#![no_main]

fuzz::program!(handshake);
