#![no_main]

fuzz::program!(frames);
