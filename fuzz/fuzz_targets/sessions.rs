#![no_main]

fuzz::program!(sessions);
