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
        if super::has_instructions() {
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
    /// ModRM's `reg`, and `vvvv` as a number: 0 where an instruction has no use for it.
    reg: usize,
    vvvv: usize,
    operand: Operand,
    length: usize,
}

enum Operand {
    Register(usize),
    /// An address, and what is added to it from row to row where the instruction has a byte that says so (SIB).
    Memory(*mut u8, Option<isize>),
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
        // Bits that would number a register above the eighth: there is none for tiles.
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
                // Number 4 means that there is none.
                stride = Some(if index == 4 { 0 } else { (value(index) << (sib >> 6)) as isize });
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
    /// Does an instruction; none where the processor would refuse it.
    unsafe fn run(&mut self, i: &Instruction) -> Option<()> {
        let configures = matches!((i.opcode, i.prefix, &i.operand), (0x49, 0, Operand::Memory(..)));
        let multiplies = matches!(i.opcode, 0x5E | 0x5C);
        if !self.is_configured && !configures || !multiplies && i.vvvv != 0 {
            return None;
        }
        // SAFETY: the addresses are those of an instruction under way.
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
                    let signed = (prefix >= 2, prefix == 1 || prefix == 3);
                    return self.multiply((i.reg, *rows, i.vvvv), |sum, x, w| add_bytes(sum, (x, w), signed));
                }
                (0x5C, 2, Operand::Register(rows)) => {
                    return self.multiply((i.reg, *rows, i.vvvv), add_halves);
                }
                _ => return None,
            }
        }
        Some(())
    }

    /// Whether the configuration gives a register any rows.
    fn is_in_use(&self, tile: usize) -> bool {
        self.rows[tile] > 0
    }

    /// Takes a configuration over; none where the processor would fault on it.
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

/// Four products of bytes, each signed or not.
fn add_bytes(sum: &mut [u32; 3], (x, w): ([u8; 4], [u8; 4]), (x_signed, w_signed): (bool, bool)) {
    let number =
        |byte: u8, signed: bool| if signed { i32::from(byte.cast_signed()) } else { i32::from(byte) };
    for j in 0..4 {
        // A negative number in two's complement wraps into the sum that it belongs to.
        let product = number(x[j], x_signed) * number(w[j], w_signed);
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

/// Numbers too small for a full mantissa are zero to these instructions, coming in and going out.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// Every product that a start proves.
#[test]
fn the_instructions_prove_themselves() {
    assert!(install() || super::is_available(), "neither AMX nor its interpreter");
    // SAFETY: the processor or the interpreter does the instructions.
    assert!(unsafe { super::proves_itself() });
}
