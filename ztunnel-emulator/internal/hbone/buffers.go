package hbone

import "sync"

// Buffers are lent: an idle connection and an idle stream hold none.
const (
	// frameHeader is the room in front of a chunk, so that a chunk of the
	// application's bytes becomes a DATA frame where it lies.
	frameHeader = 9
	// The read sizes of ztunnel's copy loop after its first 128 KiB, and after
	// 10 MiB. Its first size, 1 KiB, saves memory that a lent buffer doesn't cost.
	smallRead = 16320
	bigRead   = 262080
	bigAfter  = 10 << 20

	// wireBuffer is how much is read from a socket at once, and how much
	// ciphertext is collected for one write(2): some TLS records.
	tlsRecord  = 16<<10 + 5 + 1 + 16
	wireBuffer = 4 * tlsRecord
	// plainBuffer is how much plaintext the read loop looks at, at once.
	plainBuffer = 64 << 10

	queueSmall = 4 << 10
	queueBig   = 64 << 10
)

// bufferPool lends buffers of one size.
type bufferPool struct {
	size int
	p    sync.Pool
}

func (b *bufferPool) get() *[]byte {
	if v := b.p.Get(); v != nil {
		return v.(*[]byte)
	}
	buf := make([]byte, b.size)
	return &buf
}

func (b *bufferPool) put(buf *[]byte) { b.p.Put(buf) }

var (
	smallChunks = bufferPool{size: frameHeader + smallRead}
	bigChunks   = bufferPool{size: frameHeader + bigRead}
	wireBuffers = bufferPool{size: wireBuffer}
	plains      = bufferPool{size: plainBuffer}
	queuesSmall = bufferPool{size: queueSmall}
	queuesBig   = bufferPool{size: queueBig}
)

// chunkPool is the pool for reads of up to max bytes.
func chunkPool(max int) *bufferPool {
	if max <= smallRead {
		return &smallChunks
	}
	return &bigChunks
}

// block is a piece of a queue: b[r:w] is waiting.
type block struct {
	b    *[]byte
	from *bufferPool
	r, w int
}

// queue is the bytes that came for an application that did not take them at once.
type queue struct {
	blocks []block
	n      int // bytes in all
}

func (q *queue) empty() bool { return q.n == 0 }

// add copies p to the end.
func (q *queue) add(p []byte) {
	q.n += len(p)
	for len(p) > 0 {
		if k := len(q.blocks); k > 0 && q.blocks[k-1].w < len(*q.blocks[k-1].b) {
			last := &q.blocks[k-1]
			m := copy((*last.b)[last.w:], p)
			last.w += m
			p = p[m:]
			continue
		}
		from := &queuesBig
		if len(p) <= queueSmall && len(q.blocks) == 0 {
			from = &queuesSmall
		}
		q.blocks = append(q.blocks, block{b: from.get(), from: from})
	}
}

// head is the first bytes waiting. They stay valid, and may be read without a
// lock, until drop; add only writes behind them.
func (q *queue) head() []byte {
	first := q.blocks[0]
	return (*first.b)[first.r:first.w]
}

// drop forgets the first n bytes, all of them in head.
func (q *queue) drop(n int) {
	q.n -= n
	first := &q.blocks[0]
	first.r += n
	if first.r < first.w {
		return
	}
	first.from.put(first.b)
	q.blocks[0] = block{}
	q.blocks = q.blocks[1:]
	if len(q.blocks) == 0 {
		q.blocks = nil
	}
}

// clear forgets everything, but not the first block if someone is reading it
// without a lock, and returns how many bytes it forgot.
func (q *queue) clear(headInUse bool) int {
	kept := queue{}
	for i, b := range q.blocks {
		if i == 0 && headInUse {
			kept = queue{blocks: []block{b}, n: b.w - b.r}
			continue
		}
		b.from.put(b.b)
	}
	n := q.n - kept.n
	*q = kept
	return n
}
