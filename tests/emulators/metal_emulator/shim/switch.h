// Switching stacks: saves the callee-saved registers of the running fiber, loads those of another.
// It leaves by a jump: a return would be predicted to go back to the caller, and never does.
#pragma once

extern "C" void emu_switch(void** save_sp, void* load_sp);

#if defined(__x86_64__)
__asm__(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
)");
// Seven words: six registers and the return address; above them the stack is 16-byte aligned
// plus 8, as after a call.
inline void* fiber_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top) - 2;
  *sp = reinterpret_cast<void*>(entry);
  return sp - 6;
}
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, %function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
)");
inline void* fiber_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top - 160);
  sp[11] = reinterpret_cast<void*>(entry);  // x30, where it goes
  return sp;
}
#else
#error "the emulator switches stacks on x86-64 and arm64 only"
#endif
