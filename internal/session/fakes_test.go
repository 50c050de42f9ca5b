package session

import (
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// fakes are the other half as somebody else wrote it. They know nothing of our
// packages: what they do to the wire is all here.
var fakes = map[string]func(){
	"seed-sender":   seedSender,
	"bad-sender":    badSender,
	"fake-receiver": fakeReceiver,
}

// seedSender SOCKET NETNS: the seed's own sender. It writes one byte with the
// descriptor and closes without reading.
func seedSender() {
	f, err := os.Open(os.Args[2])
	check(err)
	conn := dial()
	_, _, err = conn.WriteMsgUnix([]byte{1}, unix.UnixRights(int(f.Fd())), nil)
	check(err)
	check(conn.Close())
}

// badSender SOCKET BYTES FILE...: sends any bytes with any descriptors and
// prints the answer.
func badSender() {
	var fds []int
	for _, path := range os.Args[3:] {
		f, err := os.Open(path)
		check(err)
		fds = append(fds, int(f.Fd()))
	}
	conn := dial()
	if words := os.Args[2]; words != "" {
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		// Who refuses without reading may be faster than we write, and resets us.
		conn.WriteMsgUnix([]byte(words), oob, nil)
	}
	conn.CloseWrite()
	answer, _ := io.ReadAll(conn)
	fmt.Printf("%q\n", answer)
}

// fakeReceiver SOCKET MODE: a receiver that takes one message and then
//
//	closes    closes without an answer, as the seed's own does when it ends
//	waits     never answers, as the seed's own does while it lives
//	garbage   answers with a byte nobody knows
//	refuses   refuses, with control characters in its reason
//	deaf      closes before it reads anything
//	ready     says ready and keeps the connection open
func fakeReceiver() {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: os.Args[1]})
	check(err)
	conn, err := l.AcceptUnix()
	check(err)
	if os.Args[2] == "deaf" {
		conn.Close()
		return
	}
	_, oobn, _, _, err := conn.ReadMsgUnix(make([]byte, 1), make([]byte, 64))
	check(err)
	if oobn == 0 {
		check(fmt.Errorf("no descriptor came"))
	}
	switch os.Args[2] {
	case "waits":
		io.Copy(io.Discard, conn) // until the sender gives up
	case "garbage":
		conn.Write([]byte("Hello"))
	case "refuses":
		conn.Write([]byte("\x01go away\x1b[2J\nsecond line"))
	case "ready":
		conn.Write([]byte{0})
		io.Copy(io.Discard, conn)
	}
	conn.Close()
}

func dial() *net.UnixConn {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: os.Args[1]})
	check(err)
	return conn
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
