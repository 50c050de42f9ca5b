package worldtest

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"testing"
	"time"
)

// castagnoli is CRC-32C, which processors have an instruction for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Pass sends n bytes that no other seed has from one end of a path, ends that
// direction, and wants just them at the other. They may take a second for 8 MiB.
func Pass(t *testing.T, from, to *Conn, n int64, seed byte) {
	t.Helper()
	deadline := time.Now().Add(Patience + time.Duration(n>>23)*time.Second)
	from.SetWriteDeadline(deadline)
	to.SetReadDeadline(deadline)
	sum := make(chan uint32, 1)
	go send(from, n, seed, sum)
	crc := crc32.New(castagnoli)
	got, err := io.CopyBuffer(crc, onlyReader{to}, make([]byte, 1<<20))
	if sent := <-sum; got != n || err != nil {
		t.Errorf("after %d bytes of %d: %v", got, n, err)
	} else if crc.Sum32() != sent {
		t.Errorf("%d bytes have arrived, but not those that were sent", n)
	}
}

// send reports the checksum of all n, whatever has become of them.
func send(c *Conn, n int64, seed byte, sum chan<- uint32) {
	block := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{seed}).Read(block)
	crc := crc32.New(castagnoli)
	for i := uint64(0); n > 0; i++ {
		b := block[:min(n, int64(len(block)))]
		binary.LittleEndian.PutUint64(block, i) // no two alike
		crc.Write(b)
		c.Write(b)
		n -= int64(len(b))
	}
	c.CloseWrite()
	sum <- crc.Sum32()
}

// onlyReader hides what io.Copy would prefer to the buffer.
type onlyReader struct{ io.Reader }
