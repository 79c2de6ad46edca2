from celery import Celery

from base.wakeup import QUEUE, celery_settings, send_wakeup


def test_send_wakeup_puts_one_message_into_the_queue():
    app = Celery("test", broker="memory://localhost/", set_as_current=False)
    app.conf.update(celery_settings("memory://localhost/"))
    with app.connection_for_read() as connection, connection.SimpleQueue(QUEUE) as queue:
        queue.clear()
        send_wakeup(app)
        assert len(queue) == 1
        queue.clear()
    app.close()


def test_celery_settings_bound_the_time_that_a_broker_in_the_network_may_take():
    options = celery_settings("redis://127.0.0.1:1/0")["broker_transport_options"]
    assert options["socket_timeout"] == options["socket_connect_timeout"] == 2
