#![no_main]

fuzz::program!(config);
