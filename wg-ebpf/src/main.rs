//! Tidegate's programs in the kernel.
#![no_std]
#![no_main]
