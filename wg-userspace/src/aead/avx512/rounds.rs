//! The twenty rounds of ChaCha20 on one set of sixteen blocks, or on two at once.
//!
//! A compiler would spill: two sets are all thirty-two registers. So this is assembly, put together
//! from steps by macros. With two sets, B does what A did three steps before, so that neither the
//! rotations of both nor their chains of dependences meet.

use std::arch::asm;

use super::scratch::Line;

/// `op x, x, y` for every pair of registers of the two lists.
macro_rules! pairs {
    ($op:literal [$($x:literal)*] [$($y:literal)*]) => {
        concat!($($op, " zmm", $x, ", zmm", $x, ", zmm", $y, "\n"),*)
    };
}

/// Turns every word of the registers left by `$n` bits.
macro_rules! turn {
    ($n:literal [$($x:literal)*]) => {
        concat!($("vprold zmm", $x, ", zmm", $x, ", ", $n, "\n"),*)
    };
}

/// Step `0..12` of four quarter rounds side by side (RFC 8439 §2.1), given their four `a`, `b`, `c`
/// and `d`.
macro_rules! step {
    (0 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpaddd" $a $b) };
    (1 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpxord" $d $a) };
    (2 $a:tt $b:tt $c:tt $d:tt) => { turn!(16 $d) };
    (3 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpaddd" $c $d) };
    (4 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpxord" $b $c) };
    (5 $a:tt $b:tt $c:tt $d:tt) => { turn!(12 $b) };
    (6 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpaddd" $a $b) };
    (7 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpxord" $d $a) };
    (8 $a:tt $b:tt $c:tt $d:tt) => { turn!(8 $d) };
    (9 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpaddd" $c $d) };
    (10 $a:tt $b:tt $c:tt $d:tt) => { pairs!("vpxord" $b $c) };
    (11 $a:tt $b:tt $c:tt $d:tt) => { turn!(7 $b) };
}

/// A step of set A, whose word `w` is register `w`: of its columns.
macro_rules! a {
    ($k:tt) => { step!($k [0 1 2 3] [4 5 6 7] [8 9 10 11] [12 13 14 15]) };
}

/// A step of set A: of its diagonals.
macro_rules! a_diagonal {
    ($k:tt) => { step!($k [0 1 2 3] [5 6 7 4] [10 11 8 9] [15 12 13 14]) };
}

/// A step of set B, whose word `w` is register `16 + w`: of its columns.
macro_rules! b {
    ($k:tt) => { step!($k [16 17 18 19] [20 21 22 23] [24 25 26 27] [28 29 30 31]) };
}

/// A step of set B: of its diagonals.
macro_rules! b_diagonal {
    ($k:tt) => { step!($k [16 17 18 19] [21 22 23 20] [26 27 24 25] [31 28 29 30]) };
}

/// A column round and a diagonal round of set A.
macro_rules! double_round {
    () => {
        concat!(
            a!(0),
            a!(1),
            a!(2),
            a!(3),
            a!(4),
            a!(5),
            a!(6),
            a!(7),
            a!(8),
            a!(9),
            a!(10),
            a!(11),
            a_diagonal!(0),
            a_diagonal!(1),
            a_diagonal!(2),
            a_diagonal!(3),
            a_diagonal!(4),
            a_diagonal!(5),
            a_diagonal!(6),
            a_diagonal!(7),
            a_diagonal!(8),
            a_diagonal!(9),
            a_diagonal!(10),
            a_diagonal!(11),
        )
    };
}

/// The same of both sets, B three steps behind.
macro_rules! double_round_of_two {
    () => {
        concat!(
            a!(0),
            a!(1),
            a!(2),
            a!(3),
            b!(0),
            a!(4),
            b!(1),
            a!(5),
            b!(2),
            a!(6),
            b!(3),
            a!(7),
            b!(4),
            a!(8),
            b!(5),
            a!(9),
            b!(6),
            a!(10),
            b!(7),
            a!(11),
            b!(8),
            a_diagonal!(0),
            b!(9),
            a_diagonal!(1),
            b!(10),
            a_diagonal!(2),
            b!(11),
            a_diagonal!(3),
            b_diagonal!(0),
            a_diagonal!(4),
            b_diagonal!(1),
            a_diagonal!(5),
            b_diagonal!(2),
            a_diagonal!(6),
            b_diagonal!(3),
            a_diagonal!(7),
            b_diagonal!(4),
            a_diagonal!(8),
            b_diagonal!(5),
            a_diagonal!(9),
            b_diagonal!(6),
            a_diagonal!(10),
            b_diagonal!(7),
            a_diagonal!(11),
            b_diagonal!(8),
            b_diagonal!(9),
            b_diagonal!(10),
            b_diagonal!(11),
        )
    };
}

/// Loads row after row of the initial state into the registers.
macro_rules! load {
    ($($w:literal)*) => {
        concat!($("vmovdqa64 zmm", $w, ", [{state} + 64*", $w, "]\n"),*)
    };
}

/// Adds the initial state, and stores the rows.
macro_rules! add_and_store {
    ($($w:literal)*) => {
        concat!($(
            "vpaddd zmm", $w, ", zmm", $w, ", [{state} + 64*", $w, "]\n",
            "vmovdqa64 [{keystream} + 64*", $w, "], zmm", $w, "\n",
        )*)
    };
}

/// The key stream of one set: row `w` has word `w` of sixteen blocks, before and after.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn one_set(state: &[Line; 16], keystream: &mut [Line; 16]) {
    // SAFETY: reads sixteen lines at `state` and writes sixteen at `keystream`, which the references
    // vouch for, lines being 64 bytes and aligned so. What it changes beside that is listed. The
    // caller's CPU has AVX-512F, as this function's has.
    unsafe {
        asm!(
            load!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
            "mov {round:e}, 10",
            "2:",
            double_round!(),
            "dec {round:e}",
            "jnz 2b",
            add_and_store!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
            state = in(reg) state.as_ptr(),
            keystream = in(reg) keystream.as_mut_ptr(),
            round = out(reg) _,
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
            out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
            options(nostack),
        );
    }
}

/// The key streams of two sets: set A's rows, then set B's.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn two_sets(state: &[[Line; 16]; 2], keystream: &mut [[Line; 16]; 2]) {
    // SAFETY: as above, with thirty-two lines each.
    unsafe {
        asm!(
            load!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
            load!(16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
            "mov {round:e}, 10",
            "2:",
            double_round_of_two!(),
            "dec {round:e}",
            "jnz 2b",
            add_and_store!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
            add_and_store!(16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
            state = in(reg) state.as_ptr(),
            keystream = in(reg) keystream.as_mut_ptr(),
            round = out(reg) _,
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
            out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nostack),
        );
    }
}

/// Writes zeros over all vector registers, and over the masks that the compiler uses.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn wipe_registers() {
    // SAFETY: touches registers only, and lists them; the CPU has them, as above.
    unsafe {
        asm!(
            "vzeroall", // the whole of the first sixteen
            "vpxord zmm16, zmm16, zmm16",
            "vpxord zmm17, zmm17, zmm17",
            "vpxord zmm18, zmm18, zmm18",
            "vpxord zmm19, zmm19, zmm19",
            "vpxord zmm20, zmm20, zmm20",
            "vpxord zmm21, zmm21, zmm21",
            "vpxord zmm22, zmm22, zmm22",
            "vpxord zmm23, zmm23, zmm23",
            "vpxord zmm24, zmm24, zmm24",
            "vpxord zmm25, zmm25, zmm25",
            "vpxord zmm26, zmm26, zmm26",
            "vpxord zmm27, zmm27, zmm27",
            "vpxord zmm28, zmm28, zmm28",
            "vpxord zmm29, zmm29, zmm29",
            "vpxord zmm30, zmm30, zmm30",
            "vpxord zmm31, zmm31, zmm31",
            "kxorq k1, k1, k1",
            "kxorq k2, k2, k2",
            "kxorq k3, k3, k3",
            "kxorq k4, k4, k4",
            "kxorq k5, k5, k5",
            "kxorq k6, k6, k6",
            "kxorq k7, k7, k7",
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
            out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
            out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
            out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            out("k1") _, out("k2") _, out("k3") _, out("k4") _,
            out("k5") _, out("k6") _, out("k7") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}
