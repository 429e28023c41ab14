#![no_main]

fuzz::program!(packets);
