/* task.c: see task.h. Assembly, because the new task returns from clone(2) on another stack. */
#include "task.h"

#if defined(__x86_64__)
__asm__(
    ".text\n.hidden start_task\n.globl start_task\n.type start_task, @function\nstart_task:\n"
    "  mov $56, %eax\n" /* clone(flags, stack, parent_tid, child_tid, tls) */
    "  xor %r10d, %r10d\n"
    "  xor %r8d, %r8d\n"
    "  syscall\n"
    "  test %rax, %rax\n"
    "  jnz 1f\n"
    "  xor %ebp, %ebp\n"
    "  pop %rax\n"
    "  pop %rdi\n"
    "  call *%rax\n"
    "  mov $60, %eax\n" /* exit */
    "  xor %edi, %edi\n"
    "  syscall\n"
    "  ud2\n"
    "1:\n"
    "  ret\n"
    ".size start_task, . - start_task\n");
#else
__asm__(
    ".text\n.hidden start_task\n.globl start_task\n.type start_task, %function\nstart_task:\n"
    "  mov x8, #220\n" /* clone(flags, stack, parent_tid, tls, child_tid) */
    "  mov x3, #0\n"
    "  mov x4, #0\n"
    "  svc #0\n"
    "  cbnz x0, 1f\n"
    "  mov x29, #0\n"
    "  ldp x1, x0, [sp], #16\n"
    "  blr x1\n"
    "  mov x8, #93\n" /* exit */
    "  mov x0, #0\n"
    "  svc #0\n"
    "  brk #0\n"
    "1:\n"
    "  ret\n"
    ".size start_task, . - start_task\n");
#endif
