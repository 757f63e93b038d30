//! AMX for processors that have none: a handler of illegal-instruction signals that does what the instruction would.
//!
//! Tests run the kernels' own machine code through it, so encodings, configurations, strides and the order of operands
//! are judged by what the manual says they mean (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
//! "AMX Instruction Set Reference") and not by a second copy of the kernels. Where the processor has AMX, nothing is
//! installed and the tests run on it. What this cannot show is speed.

use std::{cell::UnsafeCell, sync::OnceLock};

use super::{TILE_BYTES, TILE_ROW_BYTES, TILE_ROWS};

/// Installs the handler, once; whether it was.
pub(crate) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        if super::has_instructions() || !cfg!(target_os = "linux") {
            return false;
        }
        // SAFETY: the structure is plain numbers, for which zeros are a value; the handler has the signature that
        // `SA_SIGINFO` asks for.
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

/// Does the instruction at the interrupted place and goes on behind it, or ends the process as if there were no handler.
extern "C" fn handle(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands over the context of the interrupted thread; what the instruction reads and writes is what
    // the processor would have, and the state is this thread's own, which no one else uses meanwhile: the interrupted code
    // is an instruction of a kernel.
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
    /// ModRM's `reg`, and `vvvv`.
    reg: usize,
    vvvv: usize,
    operand: Operand,
    length: usize,
}

enum Operand {
    Register(usize),
    /// An address, and what is added to it from row to row.
    Memory(*mut u8, isize),
}

/// Where the context keeps the general registers, by their numbers in instructions.
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
    /// Reads an instruction; none where it is not one of AMX's kind.
    unsafe fn decode(at: *const u8, registers: &[i64; 23]) -> Option<Self> {
        // SAFETY: the processor was about to execute these bytes, so they are there.
        let byte = |i: usize| unsafe { *at.add(i) };
        let (first, second, modrm) = (byte(1), byte(2), byte(4));
        let is_ours = byte(0) == 0xC4 && first & 0x1F == 2 && second >> 7 == 0 && second >> 2 & 1 == 0;
        if !is_ours {
            return None;
        }
        let extend = |bit: u8, low: u8| usize::from(low | u8::from(first >> bit & 1 == 0) << 3);
        let value = |number: usize| registers[ORDER[number] as usize];
        let mut length = 5;
        let operand = if modrm >> 6 == 3 {
            Operand::Register(usize::from(modrm & 7))
        } else {
            let (mut base, mut stride) = (usize::from(modrm & 7), 0);
            if base == 4 {
                let sib = byte(length);
                length += 1;
                base = usize::from(sib & 7);
                let index = extend(6, sib >> 3 & 7);
                // Number 4 means that there is none.
                stride = if index == 4 { 0 } else { value(index) << (sib >> 6) };
            }
            let displacement = match modrm >> 6 {
                // A base of number 5 would mean a constant address here.
                0 if base == 5 => return None,
                0 => 0,
                1 => i64::from(byte(length).cast_signed()),
                _ => i64::from(i32::from_le_bytes(std::array::from_fn(|i| byte(length + i)))),
            };
            length += [0, 1, 4][usize::from(modrm >> 6)];
            let address = value(extend(5, base as u8)) + displacement;
            Operand::Memory(address as *mut u8, stride as isize)
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
    /// Does an instruction; none where the processor would refuse it.
    unsafe fn run(&mut self, i: &Instruction) -> Option<()> {
        if !self.is_configured && !matches!((i.opcode, i.prefix, &i.operand), (0x49, 0, Operand::Memory(..)))
        {
            return None;
        }
        // SAFETY: the addresses are those of an instruction under way.
        unsafe {
            match (i.opcode, i.prefix, &i.operand) {
                (0x49, 0, Operand::Memory(at, _)) => return self.configure(*at),
                (0x49, 0, Operand::Register(0)) if i.reg == 0 => self.is_configured = false,
                (0x49, 3, Operand::Register(0)) => self.tiles[i.reg] = [0; TILE_BYTES],
                (0x4B, 3, Operand::Memory(at, stride)) => self.load(i.reg, *at, *stride),
                (0x4B, 2, Operand::Memory(at, stride)) => self.store(i.reg, *at, *stride),
                (0x5E, prefix, Operand::Register(rows)) => {
                    let (x_signed, w_signed) = (prefix >= 2, prefix == 1 || prefix == 3);
                    return self.multiply((i.reg, *rows, i.vvvv), |sum, x, w| {
                        let number = |byte: u8, signed: bool| {
                            if signed { i32::from(byte.cast_signed()) } else { i32::from(byte) }
                        };
                        let products = (0..4).map(|j| number(x[j], x_signed) * number(w[j], w_signed));
                        sum[0] = (sum[0].cast_signed() + products.sum::<i32>()).cast_unsigned();
                    });
                }
                (0x5C, 2, Operand::Register(rows)) => {
                    return self.multiply((i.reg, *rows, i.vvvv), |sum, x, w| {
                        let number = |v: [u8; 4], j: usize| {
                            f32::from_bits(u32::from(v[j]) << 16 | u32::from(v[j + 1]) << 24)
                        };
                        for half in 0..2 {
                            let before = f32::from_bits(sum[1 + half]);
                            sum[1 + half] =
                                number(x, 2 * half).mul_add(number(w, 2 * half), before).to_bits();
                        }
                    });
                }
                _ => return None,
            }
        }
        Some(())
    }

    unsafe fn configure(&mut self, at: *const u8) -> Option<()> {
        // SAFETY: the operand has 64 bytes.
        let bytes = unsafe { at.cast::<[u8; 64]>().read_unaligned() };
        if bytes[0] != 1 || bytes[1] != 0 {
            return None;
        }
        self.rows = std::array::from_fn(|i| usize::from(bytes[48 + i]));
        self.row_bytes = std::array::from_fn(|i| usize::from(bytes[16 + 2 * i]));
        self.tiles = [[0; TILE_BYTES]; 8];
        self.is_configured = self.rows.iter().all(|rows| *rows <= TILE_ROWS)
            && self.row_bytes.iter().all(|bytes| *bytes <= TILE_ROW_BYTES);
        self.is_configured.then_some(())
    }

    unsafe fn load(&mut self, tile: usize, at: *const u8, stride: isize) {
        self.tiles[tile] = [0; TILE_BYTES];
        for row in 0..self.rows[tile] {
            let to = self.tiles[tile][row * TILE_ROW_BYTES..].as_mut_ptr();
            // SAFETY: the row lies at its distance from the address, and inside the tile.
            unsafe {
                std::ptr::copy_nonoverlapping(at.offset(stride * row as isize), to, self.row_bytes[tile]);
            };
        }
    }

    unsafe fn store(&mut self, tile: usize, at: *mut u8, stride: isize) {
        for row in 0..self.rows[tile] {
            let from = self.tiles[tile][row * TILE_ROW_BYTES..].as_ptr();
            // SAFETY: as in loading.
            unsafe {
                std::ptr::copy_nonoverlapping(from, at.offset(stride * row as isize), self.row_bytes[tile]);
            };
        }
    }

    /// Adds to each sum what `add` makes of the four bytes of each step. It has three words: the sum, and two more that
    /// begin at zero and are added to it as f32 in the end, where bf16 is summed.
    fn multiply(
        &mut self,
        (sums, rows, weights): (usize, usize, usize),
        add: impl Fn(&mut [u32; 3], [u8; 4], [u8; 4]),
    ) -> Option<()> {
        let steps = self.row_bytes[rows] / 4;
        // What the processor demands of the operands.
        let fits = weights < 8
            && sums != rows
            && sums != weights
            && rows != weights
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
                    let both = f32::from_bits(words[1]) + f32::from_bits(words[2]);
                    words[0] = (f32::from_bits(words[0]) + both).to_bits();
                }
                let at = row * TILE_ROW_BYTES + 4 * feature;
                self.tiles[sums][at..at + 4].copy_from_slice(&words[0].to_le_bytes());
            }
        }
        Some(())
    }
}

/// The instructions in use do what the plain loops do that every start compares them with.
#[test]
fn the_instructions_prove_themselves() {
    assert!(install() || super::is_available(), "neither AMX nor its interpreter");
    // SAFETY: the processor or the interpreter does the instructions.
    assert!(unsafe { super::proves_itself() });
}

/// Where the processor has AMX, `tests/conformance.rs` runs this tier as every other.
#[test]
fn the_tier_passes_the_suite() {
    use crate::{CpuBackend, CpuConfig, Tier};

    if !Tier::Amx.is_available() {
        println!("not run: this processor has not even what else AMX's tier needs");
        return;
    }
    let config = CpuConfig { tier: Some(Tier::Amx), threads: Some(2) };
    let passed = trustformers_conformance::check(&|| Ok(Box::new(CpuBackend::new(config)?)));
    assert!(
        passed.is_ok(),
        "{}",
        passed.unwrap_err().iter().map(|fault| format!("{fault}\n")).collect::<String>()
    );
}
