#![no_main]

fuzz::program!(nat);
