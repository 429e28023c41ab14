#![no_main]

fuzz::program!(handover);
