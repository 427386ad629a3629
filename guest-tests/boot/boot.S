/*
 * A boot disk of two parts, for a machine whose firmware reads it with its own NVMe driver: a boot sector, which loads 64
 * KiB from LBA 64 with the extended INT 13h calls in four requests, sums them, writes the sum to LBA 32, reads that back,
 * and says on COM1 what came of it.
 *
 *   boot: disk OK sum=XXXXXXXX   |   boot: read error AH=XX   |   boot: write error AH=XX   |   boot: what was written is lost
 */
	.code16
	.text
	.globl start
start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x7c00, %sp
	sti
	cld
	movb	%dl, drive
	movw	$hello, %si
	call	say

	/* 64 KiB to 0x10000, 32 blocks at a time: each request crosses pages */
	movw	$4, %cx
1:
	pushw	%cx
	movb	$0x42, %ah
	call	disk
	popw	%cx
	movw	$read_error, %si
	jc	error
	addw	$(32 * 512 / 16), packet_segment
	addl	$32, packet_lba
	loop	1b

	/* the sum of its 32-bit words */
	xorl	%ebx, %ebx
	movw	$0x1000, %ax
	movw	%ax, %es
	xorw	%di, %di
	movw	$(65536 / 4), %cx
2:
	addl	%es:(%di), %ebx
	addw	$4, %di
	loop	2b
	movl	%ebx, sum

	/* written as the first bytes of a block, read back to another place */
	movw	$1, packet_count
	movw	$0x800, packet_segment		/* 0x8000 */
	movl	$32, packet_lba
	movl	%ebx, 0x8000
	movw	$0x4300, %ax
	call	disk
	movw	$write_error, %si
	jc	error
	movw	$0x900, packet_segment		/* 0x9000 */
	movb	$0x42, %ah
	call	disk
	movw	$read_error, %si
	jc	error
	movw	$lost, %si
	movl	0x9000, %eax
	cmpl	sum, %eax
	jne	last

	movw	$fine, %si
	call	say
	movw	$8, %cx
3:
	roll	$4, sum
	movb	sum, %al
	call	digit
	loop	3b
	jmp	end

error:	/* SI: text, AH: the BIOS's error */
	pushw	%ax
	call	say
	popw	%ax
	movb	%ah, %al
	pushw	%ax
	shrb	$4, %al
	call	digit
	popw	%ax
	call	digit
	jmp	end
last:
	call	say
end:
	movb	$'\n', %al
	call	put
4:
	hlt
	jmp	4b

disk:	/* AH: function */
	movw	$packet, %si
	movb	drive, %dl
	int	$0x13
	ret

digit:	/* the low four bits of AL */
	andb	$15, %al
	addb	$'0', %al
	cmpb	$'9', %al
	jbe	put
	addb	$('a' - '9' - 1), %al
put:	/* AL to COM1, when it has room */
	pushw	%dx
	pushw	%ax
	movw	$0x3fd, %dx
5:
	inb	%dx, %al
	testb	$0x20, %al
	jz	5b
	popw	%ax
	movw	$0x3f8, %dx
	outb	%al, %dx
	popw	%dx
	ret
say:	/* the text at SI */
	lodsb
	testb	%al, %al
	jz	6f
	call	put
	jmp	say
6:
	ret

hello:		.asciz	"boot: sector loaded\n"
fine:		.asciz	"boot: disk OK sum="
read_error:	.asciz	"boot: read error AH="
write_error:	.asciz	"boot: write error AH="
lost:		.asciz	"boot: what was written is lost"
drive:		.byte	0
	.balign	4
sum:		.long	0
packet:		.byte	16, 0
packet_count:	.word	32
packet_offset:	.word	0
packet_segment:	.word	0x1000
packet_lba:	.quad	64

	.org	510
	.word	0xaa55
