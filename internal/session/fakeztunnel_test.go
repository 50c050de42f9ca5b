package session

import (
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func init() { fakes["fake-ztunnel"] = fakeZtunnel }

// fakeZtunnel SOCKET MODE [TEXT]: a ztunnel, by the bytes of the protocol. It
// says hello, prints each request as it came, and answers it until the agent goes.
//
//	acks    acks everything
//	nacks   answers adds with TEXT
//	deaf    acks the snapshot, and answers nothing after it
//	mute    does not even say hello
func fakeZtunnel() {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: os.Args[1]})
	check(err)
	mode := os.Args[2]
	if mode != "mute" {
		_, err = conn.Write([]byte{0x08, 0x01})
		check(err)
	}
	names := map[byte]string{0x0a: "add", 0x12: "del", 0x1a: "snapshot", 0x2a: "keep"}
	deaf := false
	b, oob := make([]byte, 1024), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := conn.ReadMsgUnix(b, oob)
		if n == 0 || err != nil {
			fmt.Println("end")
			return
		}
		what, with := names[b[0]], ""
		if oobn > 0 {
			msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
			check(err)
			fds, err := unix.ParseUnixRights(&msgs[0])
			check(err)
			check(unix.Close(fds[0]))
			with = " with a descriptor"
		}
		fmt.Printf("%s [% x]%s\n", what, b[:n], with)
		if deaf {
			continue
		}
		answer := []byte{0x0a, 0x00}
		if mode == "nacks" && what == "add" {
			text := strings.Join(os.Args[3:], " ")
			answer = append([]byte{0x0a, byte(len(text) + 2), 0x0a, byte(len(text))}, text...)
		}
		_, err = conn.Write(answer)
		check(err)
		deaf = mode == "deaf" && what == "snapshot"
	}
}
