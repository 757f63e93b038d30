//! AMX: products of whole tiles. Stable Rust has no intrinsics for AMX, so this module uses inline assembly.
//!
//! A thread has eight tile registers of up to 16 rows by 64 bytes. The rows and bytes in use must be
//! configured first, which costs hundreds of cycles, so kernels configure them once per share of an op. The
//! compiler does not use these registers. The system saves and restores them for each thread once a process
//! has requested it.
//!
//! A product adds to each 32-bit sum `C[row][feature]` the products of a row of activations `A[row][..]` and
//! a column of weights. Weights are stored in fours of 8 bits (or pairs of 16) per feature,
//! `B[k][feature][4]`, which is also the layout of [`crate::pack`].

#[cfg(all(test, target_os = "linux"))]
pub(crate) mod interpreter;

use std::{arch::asm, marker::PhantomData};

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Bytes of a tile's row.
pub(crate) const TILE_ROW_BYTES: usize = 64;
/// Bytes of a tile.
pub(crate) const TILE_BYTES: usize = TILE_ROWS * TILE_ROW_BYTES;

/// Whether the processor has AMX for 8-bit integers and for bf16, the system permits its use, and a self-test
/// gives the right products.
pub(crate) fn is_available() -> bool {
    #[cfg(all(test, target_os = "linux"))]
    if interpreter::install() {
        return true;
    }
    static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if !has_instructions() || !is_granted() {
            return false;
        }
        // SAFETY: the processor has the instructions, and the system permits their use.
        let works = unsafe { self_test() };
        if !works {
            tracing::warn!("AMX computes wrong products on this processor; another tier is used");
        }
        works
    })
}

/// CPUID leaf 7: bit 22 of EDX is `AMX-BF16`, 24 `AMX-TILE`, 25 `AMX-INT8`.
fn has_instructions() -> bool {
    const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    let (most, _) = std::arch::x86_64::__get_cpuid_max(0);
    most >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & NEEDED == NEEDED
}

/// Requests permission from Linux to use tile registers:
/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`, see `Documentation/arch/x86/xstate.rst`. AMX is not
/// used on other systems.
#[cfg(target_os = "linux")]
fn is_granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and accesses no memory of this process.
    let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    if answer != 0 {
        let error = std::io::Error::last_os_error();
        tracing::info!(%error, "this processor has AMX, but the system does not permit its use");
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn is_granted() -> bool {
    false
}

/// Compares each product that kernels use, of small integers, with plain loops.
unsafe fn self_test() -> bool {
    const ROWS: usize = 2 * TILE_ROWS;
    // Numbers that bf16 represents exactly; as unsigned bytes, weights are these numbers plus 128.
    let x = |i: usize| (i * 7 % 17) as i32 - 8;
    let w = |i: usize| (i / 3 * 7 % 17) as i32 - 8;
    let bf16 = |number: i32| ((number as f32).to_bits() >> 16) as u16;
    let rows: Vec<i8> = (0..ROWS * TILE_ROW_BYTES).map(|i| x(i) as i8).collect();
    let half_rows: Vec<u16> = (0..ROWS * TILE_ROW_BYTES / 2).map(|i| bf16(x(i))).collect();
    let weights: Vec<u8> = (0..2 * TILE_BYTES).map(|i| (w(i) + 128) as u8).collect();
    let signed: Vec<i8> = (0..TILE_BYTES / 2).map(|i| w(i) as i8).collect();
    let half_weights: Vec<u16> = (0..TILE_BYTES).map(|i| bf16(w(i))).collect();
    let mut sums = vec![0f32; ROWS * ROWS];
    let out = sums.as_mut_ptr();
    let operands = |rows: *const u8, weights: *const u8| Operands {
        rows: [rows, rows.wrapping_add(TILE_BYTES)],
        row_stride_bytes: TILE_ROW_BYTES,
        weights: [weights, weights.wrapping_add(TILE_BYTES)],
        steps: 1,
        sums: out,
    };
    let integers = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits().cast_signed()).collect::<Vec<_>>();
    // The sum of a row and a feature over `columns` columns, of which `adjacent` are stored together per
    // feature.
    let sum = |row: usize, feature: usize, columns: usize, adjacent: usize, plus: i32| -> i32 {
        let (group, feature) = (feature / TILE_ROWS, feature % TILE_ROWS);
        let weight = |k: usize| (k / adjacent * TILE_ROWS + feature) * adjacent + k % adjacent;
        (0..columns).map(|k| x(row + k) * (w(group * TILE_ROWS * columns + weight(k)) + plus)).sum()
    };
    // SAFETY: there are 32 rows of a whole step (16 shorter rows for a block), a tile of weights for each
    // group, and all sums.
    unsafe {
        let tiles = Tiles::configure(&WHOLE);
        tiles.bytes(&operands(rows.as_ptr().cast(), weights.as_ptr()));
        let bytes = integers(&sums);
        tiles.bf16(&operands(half_rows.as_ptr().cast(), half_weights.as_ptr().cast()));
        let halves = sums.iter().map(|sum| *sum as i32).collect::<Vec<_>>();
        drop(tiles);
        let tiles = Tiles::configure(&BLOCKS);
        tiles.block(rows.as_ptr().cast(), signed.as_ptr().cast(), out);
        let block = integers(&sums[..TILE_ROWS * TILE_ROWS]);
        tiles.half_block(rows.as_ptr().cast(), signed.as_ptr().cast(), out);
        let half_block = integers(&sums[..TILE_ROWS * TILE_ROWS]);
        (0..ROWS * ROWS).all(|i| {
            let (row, feature) = (i / ROWS, i % ROWS);
            bytes[i] == sum(row * 64, feature, 64, 4, 128) && halves[i] == sum(row * 32, feature, 32, 2, 0)
        }) && (0..TILE_ROWS * TILE_ROWS).all(|i| {
            let (row, feature) = (i / TILE_ROWS * BLOCK_STRIDE_BYTES, i % TILE_ROWS);
            block[i] == sum(row, feature, 32, 4, 0) && half_block[i] == sum(row, feature, 16, 4, 0)
        })
    }
}

/// The rows, and the bytes per row, in use of each register.
#[repr(C, align(64))]
pub(crate) struct Config([u8; 64]);

impl Config {
    /// Palette 1, the only one defined; the fields are those of the operand of `LDTILECFG`.
    const fn new(shapes: [(usize, usize); 8]) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut i = 0;
        while i < shapes.len() {
            let (rows, row_bytes) = shapes[i];
            assert!(rows <= TILE_ROWS && row_bytes <= TILE_ROW_BYTES && (rows == 0) == (row_bytes == 0));
            bytes[16 + 2 * i] = row_bytes as u8;
            bytes[48 + i] = rows as u8;
            i += 1;
        }
        Self(bytes)
    }
}

/// All of every register, for [`Tiles::bytes`] and [`Tiles::bf16`].
pub(crate) static WHOLE: Config = Config::new([(TILE_ROWS, TILE_ROW_BYTES); 8]);

/// For [`Tiles::block`] and [`Tiles::half_block`]: sums in 0; rows and weights of 32 columns in 1 and 2, of
/// 16 in 3 and 4.
pub(crate) static BLOCKS: Config =
    Config::new([(16, 64), (16, 32), (8, 64), (16, 16), (4, 64), (0, 0), (0, 0), (0, 0)]);

/// Operands of a product of 32 rows and 32 features over whole tiles.
pub(crate) struct Operands {
    /// Rows 0 and 16.
    pub(crate) rows: [*const u8; 2],
    pub(crate) row_stride_bytes: usize,
    /// Weights of 16 features each, step after step.
    pub(crate) weights: [*const u8; 2],
    /// Steps of 64 bytes of each row; at least one.
    pub(crate) steps: usize,
    /// 32 rows of 32 sums, each of 32 bits.
    pub(crate) sums: *mut f32,
}

/// This thread's registers, configured until it is dropped.
pub(crate) struct Tiles {
    /// Registers belong to a thread, so this is not `Send`.
    thread: PhantomData<*const ()>,
}

/// A product over whole tiles by one instruction.
macro_rules! whole_tiles {
    ($operands:expr, $instruction:literal) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x0} + {stride}]",
            "tileloadd tmm6, [{w0} + {line}]",
            concat!($instruction, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{w1} + {line}]",
            concat!($instruction, " tmm1, tmm4, tmm7"),
            "tileloadd tmm5, [{x1} + {stride}]",
            concat!($instruction, " tmm2, tmm5, tmm6"),
            concat!($instruction, " tmm3, tmm5, tmm7"),
            "add {x0}, 64",
            "add {x1}, 64",
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + 2*{line}], tmm0",
            "tilestored [{sums} + 2*{line} + 64], tmm1",
            "tilestored [{sums} + 2*{line} + 2048], tmm2",
            "tilestored [{sums} + 2*{line} + 2112], tmm3",
            x0 = inout(reg) $operands.rows[0] => _,
            x1 = inout(reg) $operands.rows[1] => _,
            w0 = inout(reg) $operands.weights[0] => _,
            w1 = inout(reg) $operands.weights[1] => _,
            steps = inout(reg) $operands.steps => _,
            stride = in(reg) $operands.row_stride_bytes,
            line = in(reg) TILE_ROW_BYTES,
            sums = in(reg) $operands.sums,
            options(nostack),
        )
    };
}

/// A product of sixteen rows of a block and its weights, in registers of one size.
macro_rules! block {
    ($rows:expr, $weights:expr, $sums:expr, $x:literal, $w:literal) => {
        asm!(
            "tilezero tmm0",
            concat!("tileloadd ", $x, ", [{rows} + {stride}]"),
            concat!("tileloadd ", $w, ", [{weights} + {line}]"),
            concat!("tdpbssd tmm0, ", $x, ", ", $w),
            "tilestored [{sums} + {line}], tmm0",
            rows = in(reg) $rows,
            weights = in(reg) $weights,
            sums = in(reg) $sums,
            stride = in(reg) BLOCK_STRIDE_BYTES,
            line = in(reg) TILE_ROW_BYTES,
            options(nostack, preserves_flags),
        )
    };
}

/// Distance between rows of a block, in bytes.
pub(crate) const BLOCK_STRIDE_BYTES: usize = 32;

impl Tiles {
    /// Configures this thread's registers.
    ///
    /// # Safety
    /// AMX is available, and the thread has no other `Tiles`.
    pub(crate) unsafe fn configure(config: &'static Config) -> Self {
        // SAFETY: the instruction reads the 64 bytes of a configuration that is valid for palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config, options(nostack, preserves_flags, readonly)) };
        Self { thread: PhantomData }
    }

    /// Signed 8-bit rows times unsigned 8-bit weights in fours per feature; sums are i32.
    ///
    /// # Safety
    /// The registers are [`WHOLE`]; the pointers are valid for the sizes above.
    pub(crate) unsafe fn bytes(&self, operands: &Operands) {
        // SAFETY: loads stay inside the rows and weights, stores inside the sums.
        unsafe { whole_tiles!(operands, "tdpbsud") };
    }

    /// Rows of bf16 times weights of bf16 in pairs per feature. Sums are f32: even and odd columns of a step
    /// have separate sums, each product fused with its addition, and both are then added to the sum of the
    /// steps before.
    ///
    /// # Safety
    /// As [`Self::bytes`].
    pub(crate) unsafe fn bf16(&self, operands: &Operands) {
        // SAFETY: as above.
        unsafe { whole_tiles!(operands, "tdpbf16ps") };
    }

    /// Sixteen rows of 32 signed bytes ([`BLOCK_STRIDE_BYTES`] apart) times signed weights of 16 features, in
    /// fours. The sums are 16 rows of 16 i32.
    ///
    /// # Safety
    /// The registers are [`BLOCKS`]; the operands have these sizes.
    pub(crate) unsafe fn block(&self, rows: *const u8, weights: *const u8, sums: *mut f32) {
        // SAFETY: loads stay inside the rows and weights, stores inside the sums.
        unsafe { block!(rows, weights, sums, "tmm1", "tmm2") };
    }

    /// As [`Self::block`] for 16 columns; the distance between rows is the same.
    ///
    /// # Safety
    /// As [`Self::block`].
    pub(crate) unsafe fn half_block(&self, rows: *const u8, weights: *const u8, sums: *mut f32) {
        // SAFETY: as above.
        unsafe { block!(rows, weights, sums, "tmm3", "tmm4") };
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the registers are this thread's and configured; their values were stored.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}
