#![no_main]

fuzz::program!(aead);
