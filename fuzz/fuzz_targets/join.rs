#![no_main]

fuzz::program!(join);
