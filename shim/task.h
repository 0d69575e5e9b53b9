/*
 * task.h: the one place where a new thread or process is made without a libc.
 */
#ifndef FSL_TASK_H
#define FSL_TASK_H

#include <stdint.h>

#define CLONE_VM 0x00000100ul
/* Of wait(2): children with any exit signal, or none. */
#define WALL 0x40000000

/*
 * clone(flags, stack_top, tid): the new task's id, or -errno. The new task finds its function and
 * that function's argument at the top of its stack (two words, which leave the stack 16-byte
 * aligned when they are popped), calls, and ends by exit(2) without ever returning here. It has no
 * TLS of its own: it may call nothing of a libc.
 */
long start_task(unsigned long flags, void *stack_top, int32_t *tid);

#endif
