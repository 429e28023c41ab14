#![no_main]

fuzz::program!(uapi);
