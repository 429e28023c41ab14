#![no_main]

fuzz::program!(routing);
