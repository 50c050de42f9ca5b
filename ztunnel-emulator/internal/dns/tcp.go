package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// maxPipelined is how many queries of one connection are under way; the next one
// stays in the socket until an answer has gone.
const maxPipelined = 32

// ServeTCP answers the queries of one client's connection, each as soon as its
// answer is there (RFC 7766, 6.2.1), until the client has ended it, or has sent
// nothing for five seconds, or ctx is done. What is under way is answered first,
// unless ctx is done. conn stays the caller's, who closes it.
func (f *Forwarder) ServeTCP(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer interrupt(ctx, conn)()
	c := &clientConn{forwarder: f, conn: conn, cancel: cancel, places: make(chan struct{}, maxPipelined)}
	defer c.answering.Wait()
	for {
		conn.SetReadDeadline(time.Now().Add(queryTimeout)) // for all of a message, so drops cost no more
		if ctx.Err() != nil {
			return
		}
		msg, err := readMessage(conn)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
				cancel() // a reset: nobody reads the answers
			}
			return
		}
		if len(msg) < headerSize {
			return // this is no DNS
		}
		select {
		case c.places <- struct{}{}:
		case <-ctx.Done():
			return
		}
		c.answering.Add(1)
		go c.answer(ctx, msg)
	}
}

// clientConn is a connection while it is served.
type clientConn struct {
	forwarder *Forwarder
	conn      net.Conn
	cancel    func() // ends the serving
	places    chan struct{}
	answering sync.WaitGroup
	writing   sync.Mutex
}

func (c *clientConn) answer(ctx context.Context, msg []byte) {
	defer c.answering.Done()
	defer func() { <-c.places }()
	answer := c.forwarder.Answer(ctx, msg, "tcp")
	c.writing.Lock() // five seconds for each message, not for those before it
	defer c.writing.Unlock()
	c.conn.SetWriteDeadline(time.Now().Add(queryTimeout))
	if ctx.Err() != nil {
		return
	}
	if writeMessage(c.conn, answer) != nil {
		c.cancel() // half a message may be out: nothing can follow
	}
}

// readMessage reads one message with its length before it (RFC 1035, 4.2.2). The
// error is io.EOF or wraps it when the stream has ended.
func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, ended(err)
	}
	msg := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(r, msg); err != nil {
		return nil, ended(err)
	}
	return msg, nil
}

func ended(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF
	}
	return err
}

// writeMessage writes both in one segment: there are resolvers that read no more.
func writeMessage(w io.Writer, msg []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...))
	return err
}
