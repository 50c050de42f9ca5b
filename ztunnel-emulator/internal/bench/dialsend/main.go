// Command dialsend is the least that a Go program can do to hand over a
// namespace: it dials, sends one byte and the descriptor, and reads the reply,
// with bare system calls. The benchmark holds cni-emulator against it.
package main

import (
	"os"
	"syscall"
)

// main hands the namespace at the second argument to the socket at the first.
func main() {
	ns, err := syscall.Open(os.Args[2], syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	check("open", err)
	conn, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	check("socket", err)
	check("connect", syscall.Connect(conn, &syscall.SockaddrUnix{Name: os.Args[1]}))
	check("sendmsg", syscall.Sendmsg(conn, []byte{1}, syscall.UnixRights(ns), nil, 0))
	reply := []byte{1} // an end without a reply is a failure
	_, err = syscall.Read(conn, reply)
	check("read", err)
	os.Exit(int(reply[0]))
}

func check(what string, err error) {
	if err != nil {
		os.Stderr.WriteString("dialsend: " + what + ": " + err.Error() + "\n")
		os.Exit(1)
	}
}
