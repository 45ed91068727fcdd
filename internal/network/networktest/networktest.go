// Package networktest is the suite that every network driver passes. It plays the machines with a TCP/IP stack of its own on the
// attachments' sockets, so that it needs no VMM. Imported by tests only.
package networktest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/atollvm/atoll/internal/network"
)

// Rig is a driver at a place of its own.
type Rig struct {
	// New opens the driver anew; the last one may have been left without Close, as by a crash.
	New func() network.Driver
	// ResolvConf is the file that the driver reads the host's resolvers from; the suite writes it.
	ResolvConf string
	// Crash kills what serves the network, in the roughest way.
	Crash func(network.Network)
}

// Net is the network that the suite uses.
var Net = network.Network{
	Name: "test", Driver: "user",
	Subnet: netip.MustParsePrefix("10.215.0.0/16"), Gateway: netip.MustParseAddr("10.215.0.1"), MTU: 65520,
}

// Endpoint returns the endpoint of the suite's machine number i, with its ports in the form of network.ParsePort.
func Endpoint(t testing.TB, i byte, name string, ports ...string) network.Endpoint {
	t.Helper()
	e := network.Endpoint{
		ID: "id-" + name, Name: name,
		MAC:     net.HardwareAddr{2, 0, 0, 0, 1, i}.String(),
		Address: netip.AddrFrom4([4]byte{10, 215, 1, i}),
	}
	for _, p := range ports {
		m, err := network.ParsePort(p)
		if err != nil {
			t.Fatal(err)
		}
		e.Ports = append(e.Ports, m...)
	}
	return e
}

// Run runs the suite.
func Run(t *testing.T, newRig func(t *testing.T) Rig) {
	for _, tt := range []struct {
		name string
		test func(*testing.T, Rig)
	}{
		{"ARPAndEcho", testARPAndEcho},
		{"DHCP", testDHCP},
		{"Spoofing", testSpoofing},
		{"Names", testNames},
		{"Upstream", testUpstream},
		{"PublishTCP", testPublishTCP},
		{"PublishUDP", testPublishUDP},
		{"PublishIPv6", testPublishIPv6},
		{"PortTaken", testPortTaken},
		{"Neighbours", testNeighbours},
		{"NAT", testNAT},
		{"Loopback", testLoopback},
		{"AttachIsIdempotent", testAttachIsIdempotent},
		{"Detach", testDetach},
		{"SilentGuest", testSilentGuest},
		{"Crash", testCrash},
		{"Recover", testRecover},
		{"RecoverAfterCrash", testRecoverAfterCrash},
		{"Metadata", testMetadata},
		{"MetadataSpoofing", testMetadataSpoofing},
		{"MetadataHoarder", testMetadataHoarder},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, newRig(t)) })
	}
}

// Attach attaches the endpoint until the test ends.
func Attach(t testing.TB, d network.Driver, e network.Endpoint) network.Attachment {
	t.Helper()
	a, err := d.Attach(t.Context(), Net, e)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Detach(context.Background(), Net, e.ID); err != nil {
			t.Error(err)
		}
	})
	return a
}

func testARPAndEcho(t *testing.T, r Rig) {
	e := Endpoint(t, 2, "web")
	w := Plug(t, Attach(t, r.New(), e))
	mac := mustMAC(t, e.MAC)
	w.Send(arpRequest(mac, e.Address, Net.Gateway))
	reply := w.Receive(2*time.Second, isARPReply)
	if reply == nil {
		t.Fatal("no ARP reply from the gateway")
	}
	gateway := net.HardwareAddr(header.ARP(reply[14:]).HardwareAddressSender())
	ping := func(to netip.Addr, within time.Duration) bool {
		w.Send(ethernetFrame(gateway, mac, header.IPv4ProtocolNumber, echoRequest(e.Address, to)))
		return w.Receive(within, func(f []byte) bool {
			return len(f) > 34 && f[23] == 1 && header.ICMPv4(f[34:]).Type() == header.ICMPv4EchoReply
		}) != nil
	}
	if !ping(Net.Gateway, 2*time.Second) {
		t.Error("no echo reply from the gateway")
	}
	if ping(netip.MustParseAddr("192.0.2.1"), 100*time.Millisecond) {
		t.Error("the gateway answers an echo request in another's name")
	}
}

func isARPReply(f []byte) bool {
	return len(f) >= 42 && header.Ethernet(f).Type() == header.ARPProtocolNumber && header.ARP(f[14:]).Op() == header.ARPReply
}

func testDHCP(t *testing.T, r Rig) {
	d := r.New()
	Attach(t, d, Endpoint(t, 9, "other"))
	e := Endpoint(t, 2, "web")
	w := Plug(t, Attach(t, d, e))
	mac := mustMAC(t, e.MAC)
	ask := func(m *dhcpv4.DHCPv4, err error) *dhcpv4.DHCPv4 {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		from := netip.AddrPortFrom(netip.IPv4Unspecified(), 68)
		w.Send(ethernetFrame(broadcast, mac, header.IPv4ProtocolNumber, datagram(from, netip.MustParseAddrPort("255.255.255.255:67"), m.ToBytes())))
		f := w.Receive(2*time.Second, func(f []byte) bool { return len(f) > 42 && f[23] == 17 && f[36] == 0 && f[37] == 68 })
		if f == nil {
			t.Fatal("no answer")
		}
		reply, err := dhcpv4.FromBytes(f[42:])
		if err != nil {
			t.Fatal(err)
		}
		return reply
	}
	offer := ask(dhcpv4.NewDiscovery(mac))
	if offer.MessageType() != dhcpv4.MessageTypeOffer || !offer.YourIPAddr.Equal(e.Address.AsSlice()) {
		t.Fatalf("offer: %s", offer.Summary())
	}
	gateway := net.IP(Net.Gateway.AsSlice())
	ack := ask(dhcpv4.NewRequestFromOffer(offer))
	if ack.MessageType() != dhcpv4.MessageTypeAck || !ack.YourIPAddr.Equal(e.Address.AsSlice()) || !ack.Router()[0].Equal(gateway) ||
		!ack.DNS()[0].Equal(gateway) || ack.SubnetMask().String() != "ffff0000" || !bytes.Equal(ack.Options.Get(dhcpv4.OptionInterfaceMTU), []byte{0xff, 0xf0}) {
		t.Errorf("ack: %s", ack.Summary())
	}
	offer.YourIPAddr = net.IPv4(10, 215, 1, 9)
	if nak := ask(dhcpv4.NewRequestFromOffer(offer)); nak.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("a request for another machine's address: %s", nak.Summary())
	}
}

func testSpoofing(t *testing.T, r Rig) {
	d := r.New()
	e, victim := Endpoint(t, 2, "evil"), Endpoint(t, 3, "victim")
	w := Plug(t, Attach(t, d, e))
	v := Plug(t, Attach(t, d, victim))
	mac, vmac, foreign := mustMAC(t, e.MAC), mustMAC(t, victim.MAC), net.HardwareAddr{2, 9, 9, 9, 9, 9}
	forged := Net.Gateway
	any := netip.AddrPortFrom(forged, 1)
	for name, frame := range map[string][]byte{
		"MAC":        ethernetFrame(vmac, foreign, header.IPv4ProtocolNumber, echoRequest(e.Address, victim.Address)),
		"address":    ethernetFrame(vmac, mac, header.IPv4ProtocolNumber, echoRequest(forged, victim.Address)),
		"no address": ethernetFrame(vmac, mac, header.IPv4ProtocolNumber, echoRequest(netip.IPv4Unspecified(), victim.Address)),
		"ARP":        arpRequest(mac, forged, victim.Address),
		"ARP MAC":    ethernetFrame(broadcast, mac, header.ARPProtocolNumber, arpRequest(foreign, e.Address, victim.Address)[14:]),
		"IPv6":       ethernetFrame(broadcast, mac, header.IPv6ProtocolNumber, make([]byte, 60)),
		"VLAN":       ethernetFrame(vmac, mac, 0x8100, datagram(any, any, nil)),
		"short":      {1, 2, 3},
		"empty":      {},
	} {
		w.Send(frame)
		if got := v.Receive(30*time.Millisecond, func([]byte) bool { return true }); got != nil {
			t.Errorf("%s: a forged frame came through: %x", name, got)
		}
	}
	w.Send(ethernetFrame(vmac, mac, header.IPv4ProtocolNumber, echoRequest(e.Address, victim.Address)))
	if v.Receive(2*time.Second, func([]byte) bool { return true }) == nil {
		t.Error("an honest frame did not come through")
	}
}

func (g *Guest) lookup(t *testing.T, transport, name string, kind uint16) *dns.Msg {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := g.Dial(ctx, transport, netip.AddrPortFrom(Net.Gateway, 53).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	c := &dns.Conn{Conn: conn, UDPSize: 4096}
	if transport == "udp" {
		c.Conn = packetConn{conn, conn.(net.PacketConn)}
	}
	if err := c.WriteMsg(new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)); err != nil {
		t.Fatal(err)
	}
	reply, err := c.ReadMsg()
	if err != nil {
		t.Fatalf("%s/%s: %v", name, transport, err)
	}
	return reply
}

// packetConn shows package dns that the connection keeps datagrams apart.
type packetConn struct {
	net.Conn
	net.PacketConn
}

func (c packetConn) Close() error                       { return c.Conn.Close() }
func (c packetConn) LocalAddr() net.Addr                { return c.Conn.LocalAddr() }
func (c packetConn) SetDeadline(t time.Time) error      { return c.Conn.SetDeadline(t) }
func (c packetConn) SetReadDeadline(t time.Time) error  { return c.Conn.SetReadDeadline(t) }
func (c packetConn) SetWriteDeadline(t time.Time) error { return c.Conn.SetWriteDeadline(t) }

func answer(m *dns.Msg) string {
	s := dns.RcodeToString[m.Rcode]
	for _, rr := range m.Answer {
		s += " " + strings.Join(strings.Fields(strings.TrimPrefix(rr.String(), rr.Header().String())), " ")
	}
	return s
}

func testNames(t *testing.T, r Rig) {
	setUpstream(t, r)
	d := r.New()
	web := Endpoint(t, 2, "web")
	g := Boot(t, Net, web, Attach(t, d, web))
	db := Endpoint(t, 3, "db")
	db.Aliases = []string{"Postgres"}
	for _, tt := range []struct {
		name string
		kind uint16
		want string
	}{
		{"web", dns.TypeA, "NOERROR 10.215.1.2"},
		{"WEB.atoll", dns.TypeA, "NOERROR 10.215.1.2"},
		{"web", dns.TypeAAAA, "NOERROR"},
		{"2.1.215.10.in-addr.arpa", dns.TypePTR, "NOERROR web.atoll."},
		{"db.atoll", dns.TypeA, "NXDOMAIN"},
		{"db", dns.TypeA, "SERVFAIL"}, // asked upstream, and there is none
	} {
		for _, transport := range []string{"udp", "tcp"} {
			if got := answer(g.lookup(t, transport, tt.name, tt.kind)); got != tt.want {
				t.Errorf("%s %s over %s: %s, want %s", tt.name, dns.TypeToString[tt.kind], transport, got, tt.want)
			}
		}
	}
	Attach(t, d, db)
	for _, name := range []string{"db", "db.atoll", "postgres"} {
		if got := answer(g.lookup(t, "udp", name, dns.TypeA)); got != "NOERROR 10.215.1.3" {
			t.Errorf("%s: %s", name, got)
		}
	}
	if err := d.Detach(t.Context(), Net, db.ID); err != nil {
		t.Fatal(err)
	}
	if got := answer(g.lookup(t, "udp", "db.atoll", dns.TypeA)); got != "NXDOMAIN" {
		t.Errorf("db.atoll after it left: %s", got)
	}
}

func setUpstream(t *testing.T, r Rig, servers ...string) {
	t.Helper()
	text := "# the host's\n"
	for _, s := range servers {
		text += "nameserver " + s + "\n"
	}
	if err := os.WriteFile(r.ResolvConf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// testUpstream has a stub resolver on the host's loopback, as systemd-resolved is.
func testUpstream(t *testing.T, r Rig) {
	if os.Geteuid() != 0 {
		t.Skip("a resolver on port 53 needs root")
	}
	const stub, dead = "127.0.9.53", "127.0.9.54"
	big := strings.Repeat("x", 200)
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		switch q.Question[0].Name {
		case "outside.example.":
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 7)}}
		case "big.example.":
			for range 20 {
				m.Answer = append(m.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{big}})
			}
			if w.RemoteAddr().Network() == "udp" {
				m.Truncate(dns.MinMsgSize)
			}
		default:
			m.Rcode = dns.RcodeNameError
		}
		w.WriteMsg(m)
	})
	for _, network := range []string{"udp", "tcp"} {
		started := make(chan struct{})
		s := &dns.Server{Addr: stub + ":53", Net: network, Handler: handler, NotifyStartedFunc: func() { close(started) }}
		failed := make(chan error, 1)
		go func() { failed <- s.ListenAndServe() }()
		select {
		case <-started:
		case err := <-failed:
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Shutdown() })
	}
	setUpstream(t, r)
	e := Endpoint(t, 2, "web")
	g := Boot(t, Net, e, Attach(t, r.New(), e))
	if got := answer(g.lookup(t, "udp", "outside.example", dns.TypeA)); got != "SERVFAIL" {
		t.Errorf("without a resolver: %s", got)
	}
	setUpstream(t, r, dead, stub) // read anew, and the next one is tried
	for _, transport := range []string{"udp", "tcp"} {
		if got := answer(g.lookup(t, transport, "outside.example", dns.TypeA)); got != "NOERROR 192.0.2.7" {
			t.Errorf("over %s: %s", transport, got)
		}
	}
	if got := answer(g.lookup(t, "udp", "none.example", dns.TypeA)); got != "NXDOMAIN" {
		t.Errorf("an unknown name: %s", got)
	}
	if m := g.lookup(t, "udp", "big.example", dns.TypeTXT); !m.Truncated {
		t.Errorf("a big answer over udp is not marked truncated: %s", answer(m))
	}
	if m := g.lookup(t, "tcp", "big.example", dns.TypeTXT); m.Truncated || len(m.Answer) != 20 {
		t.Errorf("a big answer over tcp: %d records", len(m.Answer))
	}
}

// Serve answers each connection by what it was sent in whole, which needs half-close to work.
func Serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			data, err := io.ReadAll(c)
			if err == nil {
				c.Write(data)
			}
		}()
	}
}

func hostAddress(m network.PortMapping) string {
	return netip.AddrPortFrom(m.HostAddress, m.HostPort).String()
}

func exchange(t *testing.T, conn net.Conn, data []byte) {
	t.Helper()
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("sent %d bytes, got %d back, equal: %t, %v", len(data), len(got), bytes.Equal(got, data), err)
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func testPublishTCP(t *testing.T, r Rig) {
	e := Endpoint(t, 2, "web", "80")
	a := Attach(t, r.New(), e)
	m := a.Ports[0]
	if m.HostPort == 0 || m.HostAddress != netip.MustParseAddr("127.0.0.1") || m.GuestPort != 80 {
		t.Fatalf("bound %v", m)
	}
	// The client comes first: a machine that boots is waited for.
	conn, err := net.Dial("tcp", hostAddress(m))
	if err != nil {
		t.Fatal(err)
	}
	g := Boot(t, Net, e, a)
	go Serve(g.Listen(t, 80))
	exchange(t, conn, []byte("hello"))
	for _, size := range []int{0, 1, 32 << 20} {
		conn, err := net.Dial("tcp", hostAddress(m))
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, conn, random(size))
	}
}

func testPublishUDP(t *testing.T, r Rig) {
	e := Endpoint(t, 2, "web", "0.0.0.0::53/udp")
	a := Attach(t, r.New(), e)
	pc := Boot(t, Net, e, a).ListenPacket(t, 53)
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(buf[:n], from)
		}
	}()
	port := a.Ports[0].HostPort
	var clients []net.Conn
	// The answer has to come from the address that was asked: a connected socket takes no other.
	for _, host := range []string{"127.0.0.1", "127.0.0.1", "127.0.7.7"} {
		c, err := net.Dial("udp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	for i := range 3 {
		for j, c := range clients {
			if _, err := fmt.Fprintf(c, "%d from %d", i, j); err != nil {
				t.Fatal(err)
			}
		}
	}
	buf := make([]byte, 1<<16)
	for i := range 3 {
		for j, c := range clients {
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, err := c.Read(buf)
			if want := fmt.Sprintf("%d from %d", i, j); err != nil || string(buf[:n]) != want {
				t.Fatalf("got %q, %v, want %q", buf[:n], err, want)
			}
		}
	}
	big := random(60000)
	clients[0].Write(big)
	clients[0].SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := clients[0].Read(buf); err != nil || !bytes.Equal(buf[:n], big) {
		t.Errorf("a datagram of %d bytes came back with %d, %v", len(big), n, err)
	}
}

func testPublishIPv6(t *testing.T, r Rig) {
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		t.Skipf("the host has no IPv6: %v", err)
	} else {
		l.Close()
	}
	e := Endpoint(t, 2, "web", "[::1]::80")
	a := Attach(t, r.New(), e)
	go Serve(Boot(t, Net, e, a).Listen(t, 80))
	conn, err := net.Dial("tcp", hostAddress(a.Ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, conn, []byte("six"))
}

func testPortTaken(t *testing.T, r Rig) {
	d := r.New()
	web := Endpoint(t, 2, "web", "80")
	taken := Attach(t, d, web).Ports[0].HostPort
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	me := fmt.Sprintf("(pid %d)", os.Getpid())
	for _, tt := range []struct {
		port  string
		class error
		says  string
	}{
		{fmt.Sprintf("%d:80", taken), errdefs.ErrAlreadyExists, `machine "web"`},
		{fmt.Sprintf("%d:80", l.Addr().(*net.TCPAddr).Port), errdefs.ErrAlreadyExists, me},
		{fmt.Sprintf("0.0.0.0:%d:80", l.Addr().(*net.TCPAddr).Port), errdefs.ErrAlreadyExists, me},
		{fmt.Sprintf("%d:80/udp", u.LocalAddr().(*net.UDPAddr).Port), errdefs.ErrAlreadyExists, me},
		{"192.0.2.1:8080:80", errdefs.ErrFailedPrecondition, "192.0.2.1"},
	} {
		e := Endpoint(t, 3, "db", "81", tt.port)
		_, err := d.Attach(t.Context(), Net, e)
		if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.says) || hint.Of(err) == "" {
			t.Errorf("%s: %v (hint %q)", tt.port, err, hint.Of(err))
		}
	}
	e := Endpoint(t, 3, "db", "81")
	Attach(t, d, e) // nothing was left that is in its way
}

func testNeighbours(t *testing.T, r Rig) {
	d := r.New()
	web, db := Endpoint(t, 2, "web"), Endpoint(t, 3, "db")
	gw, gd := Boot(t, Net, web, Attach(t, d, web)), Boot(t, Net, db, Attach(t, d, db))
	go Serve(gd.Listen(t, 5432))
	conn, err := gw.Dial(t.Context(), "tcp", "10.215.1.3:5432")
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, conn, random(16<<20))
}

// hostIP is an address of the host that is not its loopback.
func hostIP(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP.To4(); ip != nil && ip.IsGlobalUnicast() {
			return ip.String()
		}
	}
	t.Skip("the host has no address but its loopback")
	return ""
}

func testNAT(t *testing.T, r Rig) {
	host := hostIP(t)
	e := Endpoint(t, 2, "web")
	g := Boot(t, Net, e, Attach(t, r.New(), e))
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go Serve(l)
	conn, err := g.Dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, conn, random(32<<20))

	u, err := net.ListenPacket("udp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			u.WriteTo(buf[:n], from)
		}
	}()
	conn, err = g.Dial(t.Context(), "udp", u.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	io.WriteString(conn, "ping")
	buf := make([]byte, 16)
	if n, err := conn.Read(buf); err != nil || string(buf[:n]) != "ping" {
		t.Errorf("udp: %q, %v", buf[:n], err)
	}
}

// testLoopback tries the host's loopback by all its names, and what else the host keeps to itself.
func testLoopback(t *testing.T, r Rig) {
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan string, 16)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c.LocalAddr().String()
			c.Close()
		}
	}()
	e := Endpoint(t, 2, "web")
	g := Boot(t, Net, e, Attach(t, r.New(), e))
	port := l.Addr().(*net.TCPAddr).Port
	for _, ip := range []string{"127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "169.254.169.254", "224.0.0.1", "255.255.255.255", "10.215.0.1", "10.215.0.0", "10.215.255.255", "240.0.0.1"} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		conn, err := g.Dial(ctx, "tcp", fmt.Sprintf("%s:%d", ip, port))
		cancel()
		if err == nil {
			conn.Close()
			t.Errorf("%s: connected", ip)
		}
	}
	select {
	case a := <-accepted:
		t.Errorf("the host accepted a connection on %s", a)
	default:
	}
	// The guest's own stack may have refused; the network has to by itself.
	w := Plug(t, Attach(t, r.New(), Endpoint(t, 4, "raw")))
	u, err := net.ListenPacket("udp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	raw := Endpoint(t, 4, "raw")
	mac := mustMAC(t, raw.MAC)
	w.Send(arpRequest(mac, raw.Address, Net.Gateway))
	reply := w.Receive(2*time.Second, isARPReply)
	if reply == nil {
		t.Fatal("no ARP reply from the gateway")
	}
	gateway := net.HardwareAddr(header.ARP(reply[14:]).HardwareAddressSender())
	to := uint16(u.LocalAddr().(*net.UDPAddr).Port)
	for _, ip := range []string{"127.0.0.1", "127.8.8.8", "0.0.0.0", "255.255.255.255", "169.254.169.254"} {
		w.Send(ethernetFrame(gateway, mac, header.IPv4ProtocolNumber, datagram(netip.AddrPortFrom(raw.Address, 9), netip.AddrPortFrom(netip.MustParseAddr(ip), to), []byte(ip))))
	}
	u.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	buf := make([]byte, 64)
	if n, _, err := u.ReadFrom(buf); err == nil {
		t.Errorf("a datagram to %s reached the host's loopback", buf[:n])
	}
}

func testAttachIsIdempotent(t *testing.T, r Rig) {
	d := r.New()
	e := Endpoint(t, 2, "web", "80", "53/udp")
	a := Attach(t, d, e)
	go Serve(Boot(t, Net, e, a).Listen(t, 80))
	conn, err := net.Dial("tcp", hostAddress(a.Ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	again := Attach(t, d, e)
	if fmt.Sprint(again) != fmt.Sprint(a) {
		t.Errorf("attached again: %v, want %v", again, a)
	}
	exchange(t, conn, []byte("still there"))

	e.Ports = append(e.Ports, Endpoint(t, 2, "web", "81").Ports...) // a change takes effect, on the same card
	a = Attach(t, d, e)
	conn, err = net.Dial("tcp", hostAddress(a.Ports[0]))
	if err != nil || len(a.Ports) != 3 {
		t.Fatal(err, a)
	}
	exchange(t, conn, []byte("changed"))
}

func testDetach(t *testing.T, r Rig) {
	d := r.New()
	e := Endpoint(t, 2, "web", "80")
	a := Attach(t, d, e)
	go Serve(Boot(t, Net, e, a).Listen(t, 80))
	conn, err := net.Dial("tcp", hostAddress(a.Ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "x")
	for range 2 {
		if err := d.Detach(t.Context(), Net, e.ID); err != nil {
			t.Fatal(err)
		}
	}
	if c, err := net.Dial("tcp", hostAddress(a.Ports[0])); err == nil {
		c.Close()
		t.Error("the published port still listens")
	}
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
		t.Errorf("the connection was not reset: %v", err)
	}
	for _, path := range []string{a.Local, a.Remote} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is left", path)
		}
	}
}

// testSilentGuest has a machine that takes no frames: the others must not notice.
func testSilentGuest(t *testing.T, r Rig) {
	d := r.New()
	e, silent := Endpoint(t, 2, "web", "80"), Endpoint(t, 3, "silent", "80/udp")
	a := Attach(t, d, e)
	go Serve(Boot(t, Net, e, a).Listen(t, 80))
	sa := Attach(t, d, silent)
	Plug(t, sa) // bound, and never read
	flood, err := net.Dial("udp", hostAddress(sa.Ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer flood.Close()
	for range 2000 {
		flood.Write(make([]byte, 30000))
	}
	noisy := Endpoint(t, 4, "noisy")
	w := Plug(t, Attach(t, d, noisy))
	start := time.Now()
	for range 600 { // broadcasts go to the silent one too
		w.Send(arpRequest(mustMAC(t, noisy.MAC), noisy.Address, netip.MustParseAddr("10.215.9.9")))
	}
	w.Send(arpRequest(mustMAC(t, noisy.MAC), noisy.Address, Net.Gateway))
	if w.Receive(5*time.Second, isARPReply) == nil {
		t.Error("the gateway does not answer the noisy neighbour")
	}
	conn, err := net.Dial("tcp", hostAddress(a.Ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, conn, random(1<<20))
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("a neighbour of a silent guest took %s", took)
	}
}

// eventually repeats try until it returns nil.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func answers(m network.PortMapping) error {
	conn, err := net.Dial("tcp", hostAddress(m))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(3 * time.Second))
	io.WriteString(conn, "hello")
	conn.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
		return fmt.Errorf("answer %q, %w", got, err)
	}
	return nil
}

func testCrash(t *testing.T, r Rig) {
	d := r.New()
	e := Endpoint(t, 2, "web", "80")
	a := Attach(t, d, e)
	go Serve(Boot(t, Net, e, a).Listen(t, 80))
	for range 2 {
		if err := answers(a.Ports[0]); err != nil {
			t.Fatal(err)
		}
		r.Crash(Net)
		eventually(t, func() error { return answers(a.Ports[0]) })
	}
	if again := Attach(t, d, e); fmt.Sprint(again) != fmt.Sprint(a) {
		t.Errorf("after the crash %v, want %v", again, a)
	}
}

func testRecover(t *testing.T, r Rig) {
	d := r.New()
	e, gone := Endpoint(t, 2, "web", "80"), Endpoint(t, 3, "gone", "80")
	a, left := Attach(t, d, e), Attach(t, d, gone)
	go Serve(Boot(t, Net, e, a).Listen(t, 80))
	conn, err := net.Dial("tcp", hostAddress(a.Ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "before, ")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	d = r.New()
	if err := d.Recover(t.Context(), Net, []network.Endpoint{e}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "after")
	conn.(*net.TCPConn).CloseWrite()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if got, err := io.ReadAll(conn); err != nil || string(got) != "before, after" {
		t.Errorf("over the change of drivers: %q, %v", got, err)
	}
	if c, err := net.Dial("tcp", hostAddress(left.Ports[0])); err == nil {
		c.Close()
		t.Error("an endpoint that is not in the list is still attached")
	}
	r.Crash(Net)
	eventually(t, func() error { return answers(a.Ports[0]) })
}

func testRecoverAfterCrash(t *testing.T, r Rig) {
	d := r.New()
	e := Endpoint(t, 2, "web", "80")
	a := Attach(t, d, e)
	go Serve(Boot(t, Net, e, a).Listen(t, 80))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	r.Crash(Net)
	d = r.New()
	if err := d.Recover(t.Context(), Net, nil); err != nil {
		t.Errorf("with nothing to recover: %v", err)
	}
	e.Ports = a.Ports
	if err := d.Recover(t.Context(), Net, []network.Endpoint{e}); err != nil {
		t.Fatal(err)
	}
	if err := answers(a.Ports[0]); err != nil {
		t.Error(err)
	}
}
