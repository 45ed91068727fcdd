/* The probe guest, from which the bytes in probeguest.go are made:
   gcc -c -m64 probeguest.S -o p.o && ld -m elf_x86_64 -Ttext=0x100088 --oformat binary -e 0x100088 -o p.bin p.o */
	.code32
start:
	movl $0x181003, 0x180000	/* page tables: the first 2 MiB, by one large page */
	movl $0x182003, 0x181000
	movl $0x83, 0x182000
	movl $0x180000, %eax
	movl %eax, %cr3
	movl $0x20, %eax		/* PAE */
	movl %eax, %cr4
	movl $0xc0000080, %ecx		/* EFER.LME */
	rdmsr
	orl $0x100, %eax
	wrmsr
	movl $0x80000011, %eax		/* PG, ET, PE */
	movl %eax, %cr0
	lgdt gdtr
	ljmp $8, $long
	.code64
long:
	movl $0x10, %eax
	movl %eax, %ss
	movl $0x1f0000, %esp
	lidt idtr
	movl $handler, %eax		/* gate 6, #UD */
	movw %ax, 0x183060
	movl $0x8e000008, 0x183062
	shrl $16, %eax
	movw %ax, 0x183066
	ud2
handler:
	movl $5000000, %ecx		/* emulated instruction by instruction, as by some /dev/kvm, this takes half a minute */
1:	incl 0x184000
	loop 1b
	movb $0x2a, %al
	outb %al, $0xf4
1:	hlt
	jmp 1b
gdtr:	.word 23
	.long gdt
idtr:	.word 0x6f
	.quad 0x183000
gdt:	.quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
