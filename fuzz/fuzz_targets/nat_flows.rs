#![no_main]

fuzz::program!(nat_flows);
