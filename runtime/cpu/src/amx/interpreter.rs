//! AMX on processors without it: a signal handler for illegal instructions that interprets AMX instructions.
//!
//! Tests run the machine code of the kernels through it. So encodings, configurations, strides and the order
//! of operands are checked against the manual (Intel 64 and IA-32 Architectures Software Developer's Manual,
//! volume 2, "AMX Instruction Set Reference") and not against a second copy of the kernels. On a processor
//! with AMX no handler is installed and the tests run on the processor. The interpreter says nothing about
//! speed.

use std::{cell::UnsafeCell, sync::OnceLock};

use super::{TILE_BYTES, TILE_ROW_BYTES, TILE_ROWS};

/// Installs the handler on the first call; returns whether it is installed.
pub(crate) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        if super::has_instructions() {
            return false;
        }
        // SAFETY: the structure consists of numbers, for which zeros are valid; the handler has the signature
        // that `SA_SIGINFO` requires.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) == 0
        }
    })
}

/// One thread's registers.
struct State {
    is_configured: bool,
    rows: [usize; 8],
    row_bytes: [usize; 8],
    tiles: [[u8; TILE_BYTES]; 8],
}

thread_local! {
    static STATE: UnsafeCell<State> = const {
        UnsafeCell::new(State { is_configured: false, rows: [0; 8], row_bytes: [0; 8], tiles: [[0; TILE_BYTES]; 8] })
    };
}

/// Interprets the instruction at the interrupted address and continues after it. Any other instruction ends
/// the process, as without a handler.
extern "C" fn handle(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes the context of the interrupted thread. The instruction accesses the memory
    // that the processor would access. The state belongs to this thread, and no other code uses it now,
    // because the interrupted code is an instruction of a kernel.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as *const u8;
        let done = Instruction::decode(at, registers).and_then(|instruction| {
            STATE.with(|state| (*state.get()).run(&instruction)).map(|()| instruction.length)
        });
        match done {
            Some(length) => registers[libc::REG_RIP as usize] += length as i64,
            None => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

/// An instruction with a three-byte VEX prefix of the map 0F38.
struct Instruction {
    /// 0 for none, 1 for 66, 2 for F3, 3 for F2.
    prefix: u8,
    opcode: u8,
    /// ModRM's `reg`, and `vvvv` as a number: 0 where an instruction does not use it.
    reg: usize,
    vvvv: usize,
    operand: Operand,
    length: usize,
}

enum Operand {
    Register(usize),
    /// An address, and the distance between rows where the instruction has a SIB byte.
    Memory(*mut u8, Option<isize>),
}

/// The indices of the general registers in the context, by their numbers in instructions.
const ORDER: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

impl Instruction {
    /// Decodes an instruction; `None` where it has not the form of AMX instructions.
    unsafe fn decode(at: *const u8, registers: &[i64; 23]) -> Option<Self> {
        // SAFETY: the processor was about to execute these bytes, so they are readable.
        let byte = |i: usize| unsafe { *at.add(i) };
        let (first, second, modrm) = (byte(1), byte(2), byte(4));
        let is_ours = byte(0) == 0xC4 && first & 0x1F == 2 && second >> 7 == 0 && second >> 2 & 1 == 0;
        if !is_ours {
            return None;
        }
        // Bits for registers above the eighth; there are only eight tiles.
        let is_tile = first >> 7 == 1 && (modrm >> 6 != 3 || first >> 5 & 1 == 1);
        if !is_tile {
            return None;
        }
        let extend = |bit: u8, low: u8| usize::from(low | u8::from(first >> bit & 1 == 0) << 3);
        let value = |number: usize| registers[ORDER[number] as usize];
        let mut length = 5;
        let operand = if modrm >> 6 == 3 {
            Operand::Register(usize::from(modrm & 7))
        } else {
            let (mut base, mut stride) = (usize::from(modrm & 7), None);
            if base == 4 {
                let sib = byte(length);
                length += 1;
                base = usize::from(sib & 7);
                let index = extend(6, sib >> 3 & 7);
                // Number 4 means no index.
                stride = Some(if index == 4 { 0 } else { (value(index) << (sib >> 6)) as isize });
            }
            let displacement = match modrm >> 6 {
                // A base of number 5 would mean an absolute address here.
                0 if base == 5 => return None,
                0 => 0,
                1 => i64::from(byte(length).cast_signed()),
                _ => i64::from(i32::from_le_bytes(std::array::from_fn(|i| byte(length + i)))),
            };
            length += [0, 1, 4][usize::from(modrm >> 6)];
            let address = value(extend(5, base as u8)) + displacement;
            Operand::Memory(address as *mut u8, stride)
        };
        Some(Self {
            prefix: second & 3,
            opcode: byte(3),
            reg: usize::from(modrm >> 3 & 7),
            vvvv: usize::from(!(second >> 3) & 15),
            operand,
            length,
        })
    }
}

impl State {
    /// Executes an instruction; `None` where the processor would fault.
    unsafe fn run(&mut self, i: &Instruction) -> Option<()> {
        let configures = matches!((i.opcode, i.prefix, &i.operand), (0x49, 0, Operand::Memory(..)));
        let multiplies = matches!(i.opcode, 0x5E | 0x5C);
        if !self.is_configured && !configures || !multiplies && i.vvvv != 0 {
            return None;
        }
        // SAFETY: the addresses are those of the interrupted instruction.
        unsafe {
            match (i.opcode, i.prefix, &i.operand) {
                (0x49, 0, Operand::Memory(at, _)) if i.reg == 0 => return self.configure(*at),
                (0x49, 0, Operand::Register(0)) if i.reg == 0 => self.is_configured = false,
                (0x49, 3, Operand::Register(0)) if self.is_in_use(i.reg) => {
                    self.tiles[i.reg] = [0; TILE_BYTES];
                }
                (0x4B, 3, Operand::Memory(at, Some(stride))) if self.is_in_use(i.reg) => {
                    self.load(i.reg, *at, *stride);
                }
                (0x4B, 2, Operand::Memory(at, Some(stride))) if self.is_in_use(i.reg) => {
                    self.store(i.reg, *at, *stride);
                }
                (0x5E, prefix, Operand::Register(rows)) => {
                    let signed = Signed { x: prefix >= 2, w: prefix == 1 || prefix == 3 };
                    return self.multiply(
                        &Product { sums: i.reg, rows: *rows, weights: i.vvvv },
                        |sum, x, w| {
                            add_bytes(sum, x, w, signed);
                        },
                    );
                }
                (0x5C, 2, Operand::Register(rows)) => {
                    return self.multiply(&Product { sums: i.reg, rows: *rows, weights: i.vvvv }, add_halves);
                }
                _ => return None,
            }
        }
        Some(())
    }

    /// Whether the configuration gives the register at least one row.
    fn is_in_use(&self, tile: usize) -> bool {
        self.rows[tile] > 0
    }

    /// Loads a configuration; `None` where the processor would fault.
    unsafe fn configure(&mut self, at: *const u8) -> Option<()> {
        // SAFETY: the operand has 64 bytes.
        let bytes = unsafe { at.cast::<[u8; 64]>().read_unaligned() };
        let reserved = [&bytes[2..16], &bytes[32..48], &bytes[56..64]];
        if bytes[0] != 1 || bytes[1] != 0 || reserved.concat().iter().any(|byte| *byte != 0) {
            return None;
        }
        self.rows = std::array::from_fn(|i| usize::from(bytes[48 + i]));
        self.row_bytes =
            std::array::from_fn(|i| usize::from(u16::from_le_bytes([bytes[16 + 2 * i], bytes[17 + 2 * i]])));
        self.tiles = [[0; TILE_BYTES]; 8];
        self.is_configured = self.rows.iter().zip(&self.row_bytes).all(|(rows, bytes)| {
            *rows <= TILE_ROWS && *bytes <= TILE_ROW_BYTES && (*rows == 0) == (*bytes == 0)
        });
        self.is_configured.then_some(())
    }

    unsafe fn load(&mut self, tile: usize, at: *const u8, stride: isize) {
        self.tiles[tile] = [0; TILE_BYTES];
        for row in 0..self.rows[tile] {
            let to = self.tiles[tile][row * TILE_ROW_BYTES..].as_mut_ptr();
            // SAFETY: the row is in the operand's memory and inside the tile.
            unsafe {
                std::ptr::copy_nonoverlapping(at.offset(stride * row as isize), to, self.row_bytes[tile]);
            };
        }
    }

    unsafe fn store(&mut self, tile: usize, at: *mut u8, stride: isize) {
        for row in 0..self.rows[tile] {
            let from = self.tiles[tile][row * TILE_ROW_BYTES..].as_ptr();
            // SAFETY: as for loads.
            unsafe {
                std::ptr::copy_nonoverlapping(from, at.offset(stride * row as isize), self.row_bytes[tile]);
            };
        }
    }

    /// Calls `add` for each sum with the four bytes of each step. `add` has three words: the sum, and two
    /// words that begin at zero. Where bf16 is summed, the two words are added to the sum as f32 at the end.
    fn multiply(&mut self, product: &Product, add: impl Fn(&mut [u32; 3], [u8; 4], [u8; 4])) -> Option<()> {
        let Product { sums, rows, weights } = *product;
        let steps = self.row_bytes[rows] / 4;
        // The processor's requirements on the operands.
        let fits = weights < 8
            && sums != rows
            && sums != weights
            && rows != weights
            && [sums, rows, weights].iter().all(|tile| self.is_in_use(*tile))
            && self.rows[sums] == self.rows[rows]
            && self.row_bytes[sums] == self.row_bytes[weights]
            && self.rows[weights] == steps
            && self.row_bytes[rows].is_multiple_of(4)
            && self.row_bytes[sums].is_multiple_of(4);
        if !fits {
            return None;
        }
        let four = |tile: &[u8; TILE_BYTES], row: usize, k: usize| -> [u8; 4] {
            std::array::from_fn(|j| tile[row * TILE_ROW_BYTES + 4 * k + j])
        };
        for row in 0..self.rows[sums] {
            for feature in 0..self.row_bytes[sums] / 4 {
                let mut words = [u32::from_le_bytes(four(&self.tiles[sums], row, feature)), 0, 0];
                for k in 0..steps {
                    add(&mut words, four(&self.tiles[rows], row, k), four(&self.tiles[weights], k, feature));
                }
                if words[1..] != [0, 0] {
                    let both = flushed(f32::from_bits(words[1]) + f32::from_bits(words[2]));
                    words[0] = flushed(flushed(f32::from_bits(words[0])) + both).to_bits();
                }
                let at = row * TILE_ROW_BYTES + 4 * feature;
                self.tiles[sums][at..at + 4].copy_from_slice(&words[0].to_le_bytes());
            }
        }
        Some(())
    }
}

/// The tile registers of a multiplication.
struct Product {
    sums: usize,
    rows: usize,
    weights: usize,
}

/// Which operands of a byte product are signed.
#[derive(Clone, Copy)]
struct Signed {
    x: bool,
    w: bool,
}

/// Adds four products of bytes.
fn add_bytes(sum: &mut [u32; 3], x: [u8; 4], w: [u8; 4], signed: Signed) {
    let number =
        |byte: u8, signed: bool| if signed { i32::from(byte.cast_signed()) } else { i32::from(byte) };
    for j in 0..4 {
        // In two's complement a negative product wraps to the right sum.
        let product = number(x[j], signed.x) * number(w[j], signed.w);
        sum[0] = sum[0].wrapping_add(product.cast_unsigned());
    }
}

/// Two products of bf16, of the even and of the odd columns, each fused with its addition.
fn add_halves(sum: &mut [u32; 3], x: [u8; 4], w: [u8; 4]) {
    let number =
        |v: [u8; 4], j: usize| flushed(f32::from_bits(u32::from(v[j]) << 16 | u32::from(v[j + 1]) << 24));
    for half in 0..2 {
        let before = f32::from_bits(sum[1 + half]);
        sum[1 + half] = flushed(number(x, 2 * half).mul_add(number(w, 2 * half), before)).to_bits();
    }
}

/// These instructions treat subnormal inputs and results as zero.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

#[test]
fn the_self_test_passes() {
    assert!(install() || super::is_available(), "neither AMX nor its interpreter");
    // SAFETY: the processor or the interpreter executes the instructions.
    assert!(unsafe { super::self_test() });
}
