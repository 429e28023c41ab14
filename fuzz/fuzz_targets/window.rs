#![no_main]

fuzz::program!(window);
