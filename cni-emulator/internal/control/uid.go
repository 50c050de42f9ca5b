package control

import (
	"crypto/sha1"
	"fmt"
)

// DefaultUID is a pod's uid when nobody names one. The real agent uses the pod's,
// which the API server makes at random; here it follows from the names, so that
// the same add again is the same pod. It has the same shape: a UUID of version 5
// (RFC 9562) under a name space of our own.
func DefaultUID(namespace, name string) string {
	u := sha1.Sum([]byte("cni-emulator pod " + namespace + "/" + name))
	u[6] = u[6]&0x0f | 0x50
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}
