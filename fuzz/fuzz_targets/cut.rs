#![no_main]

fuzz::program!(cut);
